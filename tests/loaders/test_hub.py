"""loaders.hub against a hub on localhost: what is fetched, resumed, refused, and what is said."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loaders.errors import CheckpointError
from loaders.hub import local_folder, small_files, weight_files
from tests.loaders.hub_server import (
    GOOD_TOKEN,
    NARROW_TOKEN,
    FakeHub,
    client_environment,
    serve,
    sha256,
)

CLIENT = Path(__file__).with_name("hub_client.py")
MODEL = "acme/tiny"
SHARD_BYTES = 400_000


def shard(seed: int) -> bytes:
    """Bytes that differ everywhere, so that a piece in the wrong place is noticed."""
    return b"".join((seed * 1_000_003 + i).to_bytes(4, "little") for i in range(SHARD_BYTES // 4))


def safetensors(sizes: dict[str, int]) -> bytes:
    """A safetensors file of uint8 tensors, all zero, with these sizes."""
    header, end = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(end)


def files() -> dict[str, bytes]:
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {"a": names[0], "b": names[1]}
    return {
        "config.json": b'{"model_type": "tiny"}',
        "tokenizer.json": b'{"version": "1.0"}' + b" " * 100,
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        names[0]: shard(1),
        names[1]: shard(2),
        "README.md": b"# Tiny",
        "pytorch_model.bin": b"pickle",
        "original/model.safetensors": shard(3),
        "metal/model.bin": b"other",
        "consolidated.safetensors": shard(4),
    }


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve(FakeHub(repos={MODEL: files()})) as running:
        yield running


class Client:
    """Runs hub_client.py with a cache of its own."""

    def __init__(self, hub: FakeHub, cache: Path) -> None:
        self.cache = cache
        self.env = client_environment(hub, cache)

    def start(self, call: str, **arguments: Any) -> subprocess.Popen[str]:
        env = self.env | arguments.pop("env", {})
        command = [sys.executable, str(CLIENT), call, json.dumps(arguments)]
        return subprocess.Popen(
            command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # tests that a shell has put into the background hand on that SIGINT is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def run(self, call: str, **arguments: Any) -> dict[str, Any]:
        process = self.start(call, **arguments)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        return json.loads(out)

    def resolve(self, model: str = MODEL, **arguments: Any) -> dict[str, Any]:
        return self.run("resolve", path_or_id=model, **arguments)


@pytest.fixture
def client(hub: FakeHub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "cache")


def test_fetches_what_a_checkpoint_needs_and_nothing_else(hub: FakeHub, client: Client) -> None:
    result = client.resolve()
    wanted = [
        "chat_template.jinja",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert result["files"] == wanted
    for name in wanted:
        assert (Path(result["folder"]) / name).read_bytes() == hub.repos[MODEL][name]
    assert sorted(hub.fetched()) == wanted

    hub.requests.clear()
    assert client.resolve() == result
    assert not hub.fetched(), "the second call downloads nothing"


def test_takes_the_vendors_layout_when_the_root_has_no_safetensors(
    hub: FakeHub, client: Client
) -> None:
    vendor = {
        "original/config.json": b"{}",
        "original/model.safetensors": shard(5),
        "tokenizer.json": b"{}",
        "model.bin": b"pickle",
    }
    hub.repos["acme/vendor"] = vendor
    result = client.resolve("acme/vendor")
    assert result["files"] == sorted(vendor.keys() - {"model.bin"})


def test_pickle_only_repository_is_refused_before_anything_is_fetched(
    hub: FakeHub, client: Client
) -> None:
    hub.repos["acme/old"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    result = client.resolve("acme/old")
    assert "pytorch_model.bin" in result["error"] and "never opened" in result["hint"]
    assert not hub.fetched()


def test_dropped_connections_go_on_from_the_last_byte(hub: FakeHub, client: Client) -> None:
    name = "model-00001-of-00002.safetensors"
    hub.drop_after[name] = [100_000, 50_000]
    result = client.resolve()
    assert (Path(result["folder"]) / name).read_bytes() == shard(1)
    assert hub.ranges(name) == [None, "bytes=100000-", "bytes=150000-"]
    assert hub.fetched()[name] == SHARD_BYTES, "no byte is sent twice"


def test_interrupted_process_goes_on_from_where_it_stopped(hub: FakeHub, client: Client) -> None:
    name = "model-00002-of-00002.safetensors"
    hub.hang_after[name] = 300_000
    slow = {"HF_HUB_DOWNLOAD_TIMEOUT": "120"}  # that a hanging read takes to be given up
    process = client.start("resolve", path_or_id=MODEL, env=slow)
    assert hub.hanging.wait(30)
    wait_for_part(client.cache, shard(2), 300_000)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    hub.hang_after.clear()
    hub.released.set()

    result = client.resolve()
    assert (Path(result["folder"]) / name).read_bytes() == shard(2)
    assert hub.ranges(name) == [None, "bytes=300000-"]


def wait_for_part(cache: Path, content: bytes, size: int) -> None:
    """Until the cache holds `size` bytes of a file that is not complete."""
    for _ in range(200):
        parts = list(cache.rglob(f"{sha256(content)}.incomplete"))
        if parts and parts[0].stat().st_size == size:
            return
        time.sleep(0.05)
    pytest.fail(f"no part of {size} bytes in {cache}")


def test_second_process_waits_for_the_first_instead_of_mixing_bytes(
    hub: FakeHub, client: Client
) -> None:
    name = "model-00001-of-00002.safetensors"
    hub.hang_after[name] = 200_000
    first = client.start("resolve", path_or_id=MODEL)
    assert hub.hanging.wait(30)
    second = client.start("resolve", path_or_id=MODEL)
    time.sleep(1)
    hub.hang_after.clear()
    hub.released.set()
    for process in (first, second):
        out, err = process.communicate(timeout=30)
        assert "folder" in json.loads(out), err
    folder = Path(json.loads(out)["folder"])
    assert (folder / name).read_bytes() == shard(1)
    assert hub.fetched()[name] == SHARD_BYTES


def test_a_server_without_ranges_starts_the_file_again(hub: FakeHub, client: Client) -> None:
    name = "model-00001-of-00002.safetensors"
    hub.ignore_ranges = True
    hub.drop_after[name] = [100_000]
    folder = Path(client.resolve()["folder"])
    assert (folder / name).read_bytes() == shard(1)


def test_bytes_that_differ_from_the_listing_are_thrown_away(hub: FakeHub, client: Client) -> None:
    name = "model-00001-of-00002.safetensors"
    hub.corrupt.add(name)
    result = client.resolve()
    assert name in result["error"] and "sha256" in result["error"]
    assert not list(client.cache.rglob(f"blobs/{sha256(shard(1))}*"))
    hub.corrupt.clear()
    assert "folder" in client.resolve()


def test_stops_before_weights_when_the_caller_objects(hub: FakeHub, client: Client) -> None:
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    hub.repos[MODEL] |= {name: safetensors({name: 500_000}) for name in names}
    assert client.resolve(reject_type="tiny")["error"] == "tiny is not supported"
    assert [hub.ranges(name) for name in names] == [["bytes=0-99999"]] * 2, "headers alone"

    assert "folder" in client.resolve(reject_type="other")
    hub.requests.clear()
    assert "folder" in client.resolve(reject_type="tiny"), "what is here is the caller's to check"
    assert not hub.fetched()


def test_a_damaged_header_stops_before_weights(hub: FakeHub, client: Client) -> None:
    result = client.resolve(reject_type="other")  # no shard of these tests has a header
    assert "not a safetensors file" in result["error"]
    assert sum(hub.fetched().values()) < SHARD_BYTES


def test_too_small_a_disk_is_told_before_anything_large_is_fetched(
    hub: FakeHub, client: Client
) -> None:
    result = client.resolve(free_bytes=500_000)
    assert "0.80 MB are still to be downloaded" in result["error"]
    assert "0.50 MB free" in result["error"]
    assert "HF_HOME" in result["hint"]
    assert not any(name.endswith("safetensors") for name in hub.fetched())


def test_a_disk_that_fills_up_keeps_what_arrived(hub: FakeHub, client: Client) -> None:
    result = client.resolve(fail_after_bytes=250_000)
    assert "is full" in result["error"] and "HF_HOME" in result["hint"]
    parts = {part.stem: part.stat().st_size for part in client.cache.rglob("*.incomplete")}
    hub.requests.clear()
    assert "folder" in client.resolve()
    for name, content in files().items():
        if received := parts.get(sha256(content)):
            assert hub.ranges(name) == [f"bytes={received}-"]
    assert max(parts.values()) >= 150_000


@pytest.mark.parametrize(
    ("case", "message", "hint"),
    [
        ("gated", "gated", "accept the licence at {url}/acme/tiny, then run `hf auth login`"),
        ("gated with token", "gated", "HF_TOKEN"),
        ("missing", "no such model on the hub, or it is private", "check the spelling"),
        ("missing with token", "no such model on the hub, or it is private", "check the spelling"),
        ("revision", "no revision 'v9'", "{url}/acme/tiny/commits/main"),
        ("bad token", "refused the token (401)", "hf auth login"),
        ("narrow token", "no right to read this model (403)", "read access"),
        ("out of order", "HTTP 503", "try again later"),
        ("unreachable", "cannot reach http://127.0.0.1:9", "network"),
    ],
)
def test_says_what_is_wrong_and_what_to_do(
    hub: FakeHub, client: Client, case: str, message: str, hint: str
) -> None:
    arguments: dict[str, Any] = {"env": {}}
    if case.startswith("gated"):
        hub.gated.add(MODEL)
    if case.startswith("missing"):
        arguments["model"] = "acme/tinny"
    if case == "revision":
        arguments["revision"] = "v9"
    if case == "out of order":
        hub.broken = 503
    if case == "unreachable":
        arguments["env"]["HF_ENDPOINT"] = "http://127.0.0.1:9"
    tokens = {"with token": GOOD_TOKEN, "bad token": "hf_bad", "narrow token": NARROW_TOKEN}
    for words, token in tokens.items():
        if words in case:
            arguments["env"]["HF_TOKEN"] = token
    result = client.resolve(**arguments)
    assert message in result["error"]
    assert hint.format(url=hub.url) in result["hint"]
    assert "\n" not in result["error"] + result["hint"]
    assert "hf_" not in result["error"] + result["hint"], "a token must not be shown"


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub: FakeHub, client: Client) -> None:
    client.resolve(env={"HF_TOKEN": GOOD_TOKEN})
    sent = {request.path.startswith("/lfs/"): request.token for request in hub.requests}
    assert sent == {True: None, False: GOOD_TOKEN}


def test_offline_reads_the_cache_alone(hub: FakeHub, client: Client) -> None:
    offline = {"HF_HUB_OFFLINE": "1"}
    missing = client.resolve(env=offline)
    assert "not complete in the cache" in missing["error"]
    assert "run once with the network on" in missing["hint"]

    online = client.resolve()
    hub.requests.clear()
    assert client.resolve(env=offline) == online
    assert client.resolve(local_files_only=True) == online
    assert not hub.requests

    (Path(online["folder"]) / "model-00002-of-00002.safetensors").unlink()
    assert "not complete" in client.resolve(local_files_only=True)["error"]


def test_unreachable_hub_serves_the_cache_with_a_warning(hub: FakeHub, client: Client) -> None:
    online = client.resolve()
    hub.broken = 502
    result = client.resolve()
    assert result["folder"] == online["folder"]
    assert "using the copy of acme/tiny in the cache" in result["warnings"][0]


def test_an_index_that_names_a_missing_shard_is_refused(hub: FakeHub, client: Client) -> None:
    del hub.repos[MODEL]["model-00002-of-00002.safetensors"]
    result = client.resolve()
    assert "names 'model-00002-of-00002.safetensors', which is not there" in result["error"]


def test_choice_of_files() -> None:
    names = ["a.safetensors", "b.safetensors", "sub/c.safetensors", "x.bin", "config.json"]
    assert weight_files(names, None) == ["a.safetensors", "b.safetensors"]
    assert weight_files([*names, "model.safetensors"], None) == ["model.safetensors"]
    assert small_files(names) == ["config.json"]
    with pytest.raises(CheckpointError, match=r"names '\.\./evil\.safetensors'"):
        weight_files(names, b'{"weight_map": {"w": "../evil.safetensors"}}')
    for index in (b"[]", b"{", b'{"weight_map": 3}', b'{"weight_map": {"a": 1}}', b"[" * 100_000):
        with pytest.raises(CheckpointError):
            weight_files(names, index)


def test_local_names(tmp_path: Path) -> None:
    bundled = {"demo": tmp_path, "gone": tmp_path / "gone"}
    assert local_folder(str(tmp_path)) == tmp_path
    assert local_folder("demo", bundled=bundled) == tmp_path
    assert local_folder("openai/gpt-oss-20b") is None
    assert local_folder("gpt2") is None
    with pytest.raises(CheckpointError, match="missing from this installation"):
        local_folder("gone", bundled=bundled)
    with pytest.raises(ValueError, match="revision applies to hub models"):
        local_folder(str(tmp_path), revision="main")
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file"):
        local_folder(str(file))
    for name in ("./missing", "/missing/folder", "a/b/c", "~/missing", "a b", "", "a..b", "-x/y"):
        with pytest.raises(CheckpointError, match="no such folder"):
            local_folder(name)


@pytest.fixture
def large(hub: FakeHub) -> dict[str, int]:
    """A model of 6 MB in two shards, one with a header of its own size; sizes by tensor."""
    one = {"a": 3_000_000}
    many = {f"layers.{i}.a.rather.long.name": 1000 for i in range(3000)}
    shards = {"model-00001-of-00002.safetensors": one, "model-00002-of-00002.safetensors": many}
    weight_map = {name: shard for shard, sizes in shards.items() for name in sizes}
    hub.repos[MODEL] |= {shard: safetensors(sizes) for shard, sizes in shards.items()}
    hub.repos[MODEL]["model.safetensors.index.json"] = json.dumps(
        {"weight_map": weight_map}
    ).encode()
    return one | many


def test_headers_come_without_weights(hub: FakeHub, client: Client, large: dict[str, int]) -> None:
    result = client.run("remote_headers", repo_id=MODEL, env={"HF_TOKEN": GOOD_TOKEN})
    assert result["tensors"] == large
    assert result["config"] == {"model_type": "tiny"}
    assert result["template"] == "{{ messages }}"
    assert "only the headers are here" in result["read_error"]
    first, second = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert hub.ranges(first) == ["bytes=0-99999"]
    assert hub.ranges(second)[0] == "bytes=0-99999" and len(hub.ranges(second)) == 2
    header = len(hub.repos[MODEL][second]) - sum(large.values()) + large["a"]
    assert hub.fetched()[first] + hub.fetched()[second] == 100_000 + header
    assert not list(client.cache.rglob("blobs")), "nothing is stored"


def test_headers_need_no_more_from_a_server_without_ranges(
    hub: FakeHub, client: Client, large: dict[str, int]
) -> None:
    hub.ignore_ranges = True
    hub.pause_after = 1_000_000
    assert client.run("headers", repo_id=MODEL)["tensors"] == large
    assert hub.fetched()["model-00001-of-00002.safetensors"] <= 1_000_000


def test_a_dropped_header_is_asked_for_again(
    hub: FakeHub, client: Client, large: dict[str, int]
) -> None:
    hub.drop_after["model-00001-of-00002.safetensors"] = [50]
    assert client.run("headers", repo_id=MODEL)["tensors"] == large


def test_headers_offline_come_from_the_cache(
    hub: FakeHub, client: Client, large: dict[str, int]
) -> None:
    client.resolve()
    result = client.run("remote_headers", repo_id=MODEL, env={"HF_HUB_OFFLINE": "1"})
    assert result["tensors"] == large


def test_headers_of_a_gated_model_say_so(hub: FakeHub, client: Client) -> None:
    hub.gated.add(MODEL)
    assert "gated" in client.run("headers", repo_id=MODEL)["error"]
