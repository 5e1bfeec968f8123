"""Checkpoint folders: layouts, shards and index, and each way in which they can be wrong."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from loaders.checkpoint import Checkpoint, open_files, open_folder
from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.files import FolderFiles
from tests.loaders.raw_files import edit_header, edit_json
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss

SMALL = {"layers": 2, "d": 32, "f": 32, "heads": 2, "kv": 1, "hd": 8, "experts": 2, "vocab": 16}
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    write_tiny_gpt_oss(tmp_path, **SMALL)
    return tmp_path


def assert_same_tensors(checkpoint, expected):
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name


@pytest.mark.parametrize("layout", ["huggingface", "original"])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_reads_what_was_written(tmp_path, layout, shards):
    expected = write_tiny_gpt_oss(tmp_path, layout=layout, shards=shards, **SMALL)
    with open_folder(tmp_path) as checkpoint:
        assert checkpoint.layout == layout
        assert checkpoint.config["hidden_size"] == 32
        assert checkpoint.total_bytes == sum(t.nbytes for t in expected.values())
        assert_same_tensors(checkpoint, expected)


def test_both_layouts_in_one_folder_reads_the_root(tmp_path):
    expected = write_tiny_gpt_oss(tmp_path, **SMALL)
    write_tiny_gpt_oss(tmp_path, layout="original", seed=1, **SMALL)
    checkpoint = open_folder(tmp_path)
    assert checkpoint.layout == "huggingface"
    assert_same_tensors(checkpoint, expected)


def test_the_original_folder_itself(tmp_path):
    """With its files beside it or alone, under its own name or another."""
    expected = write_tiny_gpt_oss(tmp_path, layout="original", vocab=265, tokenizer=True)
    alone = open_folder(tmp_path / "original")
    assert alone.layout == "original" and alone.file_text("tokenizer.json") is None
    shutil.copytree(tmp_path / "original", tmp_path / "other")
    assert open_folder(tmp_path / "other").layout == "original"

    (tmp_path / "config.json").write_text("{}")  # now the parent is a whole repository
    beside = open_folder(tmp_path / "original")
    assert beside.layout == "original"
    assert beside.generation_config["eos_token_id"] == [258, 257, 264]
    assert "added_tokens" in beside.file_text("tokenizer.json")
    assert_same_tensors(beside, expected)


def test_an_original_folder_with_an_index(tmp_path):
    expected = write_tiny_gpt_oss(tmp_path, layout="original", shards=2, **SMALL)
    original = tmp_path / "original"
    weight_map = {name: info.file.split("/")[1] for name, info in
                  open_folder(tmp_path).tensors.items()}  # fmt: skip
    (original / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_same_tensors(open_folder(tmp_path), expected)
    del weight_map["norm.scale"]
    (original / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"does not list norm.scale"):
        open_folder(tmp_path)


def test_symbolic_links_as_in_the_hub_cache(folder, tmp_path):
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file():
            (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert open_folder(snapshot).tensors.keys() == open_folder(folder).tensors.keys()


def test_tensors_outlive_the_checkpoint_and_its_files(folder):
    with open_folder(folder) as checkpoint:
        norm = checkpoint.read("model.norm.weight")
        expected = norm.clone()
    shutil.rmtree(folder)
    assert torch.equal(norm, expected)


def test_writing_into_a_tensor_leaves_the_file_alone(folder):
    open_folder(folder).read("model.norm.weight").zero_()
    assert open_folder(folder).read("model.norm.weight").abs().sum() > 0


def test_misaligned_tensors(tmp_path):
    """Files with odd offsets exist; safetensors itself sorts by size, so the header is edited."""
    tensors = {"a": torch.randn(5), "b": torch.arange(3, dtype=torch.uint8)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)

    def byte_tensor_first(header):
        header["b"]["data_offsets"], header["a"]["data_offsets"] = [0, 3], [3, 23]

    edit_header(path, byte_tensor_first)
    raw = path.read_bytes()
    path.write_bytes(raw[:-23] + raw[-3:] + raw[-23:-3])
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    assert_same_tensors(open_folder(tmp_path), tensors)


def test_headers_alone(folder):
    checkpoint = open_files(FolderFiles(folder))
    assert isinstance(checkpoint, Checkpoint) and len(checkpoint.tensors) == 2 * 19 + 3
    with pytest.raises(CheckpointError, match="only the headers are here"):
        checkpoint.read("model.norm.weight")


def test_side_files(folder):
    (folder / "chat_template.jinja").write_text("caf\u00e9", encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(b"ab\xff")
    checkpoint = open_folder(folder)
    assert checkpoint.file_text("chat_template.jinja") == "caf\u00e9"
    assert checkpoint.file_text("tokenizer_config.json") is None
    with pytest.raises(CheckpointError, match=r"tokenizer.json: byte 2 is not UTF-8"):
        checkpoint.file_text("tokenizer.json")


def test_an_enormous_side_file_is_not_read(folder):
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: expected at most 100000000 bytes"):
        open_folder(folder).file_text("tokenizer.json")


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def change_index(edit):
    return lambda folder: edit_json(folder / INDEX, edit)


def change_map(**names):
    return change_index(lambda index: index["weight_map"].update(names))


def truncate(folder):
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 100)


def swap(folder):
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)


def duplicate(folder):
    """The index names both shards and both hold the same tensors."""
    shutil.copy(folder / FIRST, folder / SECOND)


def second_key(folder):
    text = (folder / INDEX).read_text()
    again = f'"weight_map": {{"lm_head.weight": "{SECOND}", '
    (folder / INDEX).write_text(text.replace('"weight_map": {', again))


def replace_by_folder(folder):
    (folder / FIRST).unlink()
    (folder / FIRST).mkdir()


def replace_by_pipe(folder):
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)


def dangling_link(folder):
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to("../../blobs/0123")


def enormous_config(folder):
    with (folder / "config.json").open("ab") as file:
        file.truncate(1 << 40)


BAD = {
    "no config": (remove("config.json"), "config.json is missing"),
    "config not JSON": (write("config.json", "{model"), "config.json: not a valid JSON file"),
    "config a list": (write("config.json", "[1]"), "config.json: expected a JSON object, found"),
    "config empty": (write("config.json", ""), "config.json: not a valid JSON file"),
    "config enormous": (enormous_config, "config.json: expected at most 4000000 bytes"),
    "config key twice": (write("config.json", '{"a": 1, "a": 2}'), "'a' is given twice"),
    "generation config": (write("generation_config.json", "?"), "generation_config.json: not a"),
    "truncated shard": (truncate, f"{SECOND} is truncated: expected [0-9]+ bytes, found [0-9]+"),
    "shard missing": (remove(SECOND), f"names 2 shards, 1 missing: {SECOND}"),
    "shard a folder": (replace_by_folder, f"{FIRST}: expected a file"),
    "shard a pipe": (replace_by_pipe, f"{FIRST}: expected a file"),
    "shard a dead link": (dangling_link, f"{FIRST} cannot be read: No such file"),
    "shards swapped": (swap, f"places .* in {FIRST}, found it in {SECOND}"),
    "tensor in two shards": (duplicate, f"is in two shards: {FIRST} and {SECOND}"),
    "no index": (remove(INDEX), f"2 safetensors files, but neither model.safetensors nor {INDEX}"),
    "index not JSON": (write(INDEX, "{"), f"{INDEX}: not a valid JSON file"),
    "index without map": (write(INDEX, '{"a": {}}'), "weight_map: expected a JSON object"),
    "index names no file": (change_map(**{"lm_head.weight": 3}), "'3', which is not a safetens"),
    "index names a pickle": (change_map(x="model.bin"), "'model.bin', which is not a safetensors"),
    "shard outside": (change_map(x="../x.safetensors"), "a shard outside the folder: '../x.saf"),
    "shard absolute": (change_map(x="/etc/x.safetensors"), "a shard outside the folder"),
    "shard outside, \\": (change_map(x="..\\x.safetensors"), "a shard outside the folder"),
    "tensor only in index": (change_map(ghost=FIRST), f"places 'ghost' in {FIRST}, which does"),
    "tensor not in index": (
        change_index(lambda index: index["weight_map"].pop("lm_head.weight")),
        f"does not list lm_head.weight, found in {FIRST}",
    ),
    "tensor twice in index": (second_key, "'lm_head.weight' is given twice"),
    "wrong total": (
        change_index(lambda index: index["metadata"].update(total_size=17)),
        "metadata.total_size: expected [0-9]+ bytes, the sum of all tensors, found 17",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders(folder, case):
    damage, message = BAD[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_folder(folder)
    assert "\n" not in caught.value.message


def test_a_total_written_as_a_float(folder):
    def as_float(index):
        index["metadata"]["total_size"] = float(index["metadata"]["total_size"])

    edit_json(folder / INDEX, as_float)
    assert open_folder(folder).total_bytes > 0


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "consolidated.00.x"]
)
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=f"found {name} and no safetensors\npickle is never"):
        open_folder(tmp_path)


def test_gguf_is_refused(tmp_path):
    (tmp_path / "model-Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match="GGUF files are not supported"):
        open_folder(tmp_path)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_folder(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config.json is missing, and there are no safetens"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="there are no safetensors files"):
        open_folder(tmp_path)


def test_a_missing_shard_of_the_original_layout_shows_in_the_numbering(tmp_path):
    write_tiny_gpt_oss(tmp_path, layout="original", shards=3, **SMALL)
    (tmp_path / "original" / "model--00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model--00002-of-00003.safetensors is missing"):
        open_folder(tmp_path)


def test_a_shard_that_shrinks_after_opening(folder):
    checkpoint = open_folder(folder)
    for shard in (FIRST, SECOND):
        os.truncate(folder / shard, 5000)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.read("model.layers.1.mlp.router.weight")
