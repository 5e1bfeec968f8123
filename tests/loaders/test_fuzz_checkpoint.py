"""Damaged checkpoints of every kind: they open and load, or raise one of our two errors.

Never another exception, a hang, or an allocation out of proportion to the files.
"""

import contextlib
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loaders.checkpoint import open_folder
from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.weights import load_mapped, load_staged
from moe_runtime.models.registry import plan_model
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss

SHAPE = {"layers": 2, "d": 32, "f": 32, "heads": 2, "kv": 1, "hd": 8, "experts": 2, "topk": 1,
         "vocab": 16}  # fmt: skip
SPARE_BYTES = 400 << 20  # address space that a load of 50 KB may take: buffers, threads, mappings
FUZZ = settings(
    max_examples=100,
    deadline=5000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Sound checkpoints by layout."""
    folder = tmp_path_factory.mktemp("sources")
    for layout in ("huggingface", "original"):
        write_tiny_gpt_oss(folder / layout, layout=layout, **SHAPE)
    return folder


@contextlib.contextmanager
def damaged_copy(source: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(shutil.copytree(source, Path(scratch) / "model"))


@contextlib.contextmanager
def address_space_limit(spare: int) -> Iterator[None]:
    """Allocations beyond `spare` bytes fail, so that a test sees them as another exception."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def load(folder: Path) -> bool:
    """Whether the checkpoint loads; False for one of our errors, each in one line."""
    with address_space_limit(SPARE_BYTES):
        try:
            with open_folder(folder) as checkpoint:
                plan = plan_model(checkpoint).plan
                for how in (load_mapped, load_staged):
                    how(checkpoint, plan, torch.device("cpu"), lambda count: None)
        except (CheckpointError, UnsupportedModelError) as error:
            assert error.message and "\n" not in error.message and len(error.message) < 600
            return False
        return True


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


layouts = st.sampled_from(["huggingface", "original"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
config_values = json_values | st.sampled_from([0, -1, 1, 2, 3, 31, 32, 33, 64, 10**9, 10**90])


@FUZZ
@given(layout=layouts, data=st.data())
def test_bytes_changed_anywhere(sources, layout, data):
    """Mostly in headers and JSON, where it matters."""
    with damaged_copy(sources / layout) as folder:
        for _ in range(data.draw(st.integers(1, 4))):
            path = data.draw(st.sampled_from(files_of(folder)))
            raw = bytearray(path.read_bytes())
            most = data.draw(st.sampled_from([10, 200, len(raw)]))
            at = data.draw(st.integers(0, min(most, len(raw)) - 1))
            raw[at] = data.draw(st.integers(0, 255))
            path.write_bytes(raw)
        load(folder)


@FUZZ
@given(layout=layouts, data=st.data())
def test_files_cut_grown_deleted_or_swapped(sources, layout, data):
    with damaged_copy(sources / layout) as folder:
        path = data.draw(st.sampled_from(files_of(folder)))
        size = path.stat().st_size
        action = data.draw(st.sampled_from(["cut", "grow", "delete", "swap", "empty"]))
        if action == "cut":
            os.truncate(path, data.draw(st.integers(0, size - 1)))
        elif action == "grow":
            os.truncate(path, size + data.draw(st.sampled_from([1, 8, 10**6, 1 << 40])))
        elif action == "delete":
            path.unlink()
        elif action == "swap":
            other = data.draw(st.sampled_from(files_of(folder)))
            first, second = path.read_bytes(), other.read_bytes()
            path.write_bytes(second)
            other.write_bytes(first)
        else:
            path.write_bytes(b"")
        # Shards of the original layout have no index that could tell them apart.
        harmless = action == "swap" and (
            path == other or (layout == "original" and path.suffix == other.suffix)
        )
        assert load(folder) == harmless


@FUZZ
@given(layout=layouts, data=st.data())
def test_config_values_changed(sources, layout, data):
    with damaged_copy(sources / layout) as folder:
        path = next(p for p in files_of(folder) if p.name == "config.json")
        config = json.loads(path.read_text())
        for _ in range(data.draw(st.integers(1, 3))):
            target = config
            if isinstance(config.get("rope_scaling"), dict) and data.draw(st.booleans()):
                target = config["rope_scaling"]
            key = data.draw(st.sampled_from(sorted(target)))
            if data.draw(st.booleans()):
                target[key] = data.draw(config_values)
            else:
                target.pop(key)
        path.write_text(json.dumps(config))
        load(folder)


@FUZZ
@given(layout=layouts, data=st.data())
def test_header_entries_changed(sources, layout, data):
    """Names, dtypes, shapes and offsets, in JSON that stays valid."""
    with damaged_copy(sources / layout) as folder:
        path = data.draw(st.sampled_from([p for p in files_of(folder) if p.suffix != ".json"]))
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
        action = data.draw(st.sampled_from(["rename", "drop", "replace", "field"]))
        if action == "rename":
            other = data.draw(st.sampled_from(sorted(header)) | st.text(max_size=20))
            header[other] = header.pop(name)
        elif action == "drop":
            del header[name]
        elif action == "replace":
            header[name] = data.draw(json_values)
        else:
            field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            sizes = st.lists(st.integers(-2, 70) | st.integers(0, 2**64), max_size=4)
            dtypes = st.sampled_from(["BF16", "F16", "F32", "U8", "F8_E4M3", "F4", "X"])
            header[name][field] = data.draw(sizes | dtypes | json_values)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
        load(folder)


@FUZZ
@given(data=st.data())
def test_index_changed(sources, data):
    with damaged_copy(sources / "huggingface") as folder:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        weight_map = index["weight_map"]
        name = data.draw(st.sampled_from(sorted(weight_map)) | st.text(max_size=8))
        shards = sorted(set(weight_map.values()))
        places = st.sampled_from([*shards, "../x.safetensors", "/dev/zero", "config.json", ""])
        action = data.draw(st.sampled_from(["place", "drop", "total", "whole"]))
        if action == "place":
            weight_map[name] = data.draw(places | json_values)
        elif action == "drop":
            weight_map.pop(name, None)
        elif action == "total":
            index["metadata"] = data.draw(json_values | st.just({"total_size": 3}))
        else:
            index = data.draw(json_values)
        path.write_text(json.dumps(index))
        load(folder)


def test_the_limit_does_catch_a_large_allocation(sources):
    """The guard of all tests here works, and a sound checkpoint passes under it."""
    assert load(sources / "huggingface") and load(sources / "original")
    with address_space_limit(SPARE_BYTES), pytest.raises(RuntimeError, match="allocate memory"):
        torch.empty(1 << 30, dtype=torch.uint8)
