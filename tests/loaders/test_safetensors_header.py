"""Headers of safetensors files: right ones as safetensors reads them, wrong ones refused."""

import pytest
import torch
from safetensors.torch import save_file

from loaders.errors import CheckpointError
from loaders.safetensors_header import DTYPE_BITS, header_bytes, parse_header
from tests.loaders.raw_files import entry, raw_safetensors

TWO = {"a": entry("BF16", [2, 3], 0, 12), "b": entry("U8", [5], 12, 17)}


def parse(header, data=b"", *, length=None, file_size=-1):
    raw = raw_safetensors(header, data, length=length)
    size = len(raw) if file_size == -1 else file_size
    return parse_header(raw, file="x.safetensors", file_size=size)


def test_a_file_by_safetensors(tmp_path):
    tensors = {
        "z": torch.arange(6, dtype=torch.float32).view(2, 3),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "codes": torch.arange(7, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
    }
    path = tmp_path / "t.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    raw = path.read_bytes()
    infos = parse_header(raw, file=path.name, file_size=len(raw))
    assert infos.keys() == tensors.keys()
    for name, info in infos.items():
        stored = tensors[name].contiguous().view(-1).view(torch.uint8)
        assert info.shape == tuple(tensors[name].shape)
        assert raw[info.start : info.end] == bytes(stored.tolist())
    assert {n: i.dtype for n, i in infos.items()} == {
        "z": "F32", "scalar": "BF16", "codes": "U8", "empty": "F32",
    }  # fmt: skip


def test_only_the_first_bytes_of_a_remote_file():
    """A range request brings the header and some more; the size comes from elsewhere, or not."""
    raw = raw_safetensors(TWO, b"data that")
    end = header_bytes(raw[:8], file="x", file_size=None)
    infos = parse_header(raw[:end], file="x", file_size=end + 17)
    assert infos == parse_header(raw, file="x", file_size=None)
    assert (infos["b"].start, infos["b"].end, infos["b"].nbytes) == (end + 12, end + 17, 5)


def test_every_dtype_has_its_size():
    for dtype, bits in DTYPE_BITS.items():
        assert parse({"a": entry(dtype, [8], 0, bits)}, bytes(bits))["a"].nbytes == bits


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "expected at least 8 bytes, found 0"),
        (b"\x02\0\0", "expected at least 8 bytes, found 3"),
        (raw_safetensors(b"{}", length=1 << 62), "header claims 4611686018427387904 bytes"),
        (raw_safetensors(b"{}", length=200_000_000), "expected 2 to 100000000"),
        (raw_safetensors(b"{}", length=1), "header claims 1 bytes"),
        (raw_safetensors(b"{}", length=3), "header claims 11 bytes, the file has 10"),
        (raw_safetensors(b"[]"), "expected a JSON object, found \\[\\]"),
        (raw_safetensors(b"{'a'}"), "not a valid JSON file"),
        (raw_safetensors(b"\xff\xfe{}"), "byte 0 is not UTF-8"),
        (raw_safetensors(b'{"a":' + b"[" * 100_000), "nested too deeply"),
        (raw_safetensors(b'{"a":1,"a":2}'), "'a' is given twice"),
        (raw_safetensors(b'{"a":' + b"9" * 10_000 + b"}"), "an integer of 10000 digits"),
    ],
)
def test_what_is_no_header(raw, message):
    with pytest.raises(CheckpointError, match=message):
        parse_header(raw, file="x.safetensors", file_size=len(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "BF17"}, "unknown dtype 'BF17'"),
        ({"dtype": None}, "unknown dtype None"),
        ({"dtype": ["BF16"]}, "unknown dtype"),
        ({"shape": [2, -3]}, "is not a shape"),
        ({"shape": [2, 3.0]}, "is not a shape"),
        ({"shape": [True, 6]}, "is not a shape"),
        ({"shape": [1] * 17}, "is not a shape"),
        ({"shape": {"0": 2}}, "is not a shape"),
        ({"shape": [1 << 62, 1 << 62]}, "is not a shape"),
        ({"shape": [1 << 49, 1 << 49]}, "needs other bytes, its offsets span 12"),
        ({"shape": [2, 4]}, r"BF16 of shape \(2, 4\) needs 16 bytes, its offsets span 12"),
        ({"dtype": "F4", "shape": [25]}, "needs other bytes, its offsets span 12"),
        ({"data_offsets": [12, 0]}, "are not data offsets"),
        ({"data_offsets": [0]}, "are not data offsets"),
        ({"data_offsets": None}, "None are not data offsets"),
        ({"data_offsets": [-12, 0]}, "are not data offsets"),
        ({"data_offsets": [2, 14]}, "a follows a hole: expected it at byte"),
        ({"shape": [4, 3], "data_offsets": [0, 24]}, "b overlaps the tensor before it"),
    ],
)
def test_a_wrong_entry(change, message):
    header = {**TWO, "a": {**TWO["a"], **change}}
    with pytest.raises(CheckpointError, match=message):
        parse(header, bytes(17))


@pytest.mark.parametrize("name", ["", "a\nb", "a" * 1001, "\ud800"])
def test_a_name_that_would_break_a_message(name):
    with pytest.raises(CheckpointError, match="is not usable") as caught:
        parse({name: entry("U8", [1], 0, 1)}, b"x")
    assert "\n" not in caught.value.message


def test_an_entry_that_is_no_object():
    with pytest.raises(CheckpointError, match=r"x.safetensors: a: expected a JSON object, found 3"):
        parse({"a": 3})


def test_a_truncated_file_says_what_to_do():
    raw = raw_safetensors(TWO, bytes(16))
    expected = f"truncated: expected {len(raw) + 1} bytes, found {len(raw)}\n.*download the file"
    with pytest.raises(CheckpointError, match=expected):
        parse_header(raw, file="x.safetensors", file_size=len(raw))


def test_bytes_after_the_last_tensor():
    with pytest.raises(CheckpointError, match=r"x.safetensors is too long"):
        parse(TWO, bytes(18))


def test_fewer_bytes_than_the_header():
    raw = raw_safetensors(TWO, bytes(17))
    with pytest.raises(CheckpointError, match="only 20 were read"):
        parse_header(raw[:20], file="x", file_size=len(raw))
