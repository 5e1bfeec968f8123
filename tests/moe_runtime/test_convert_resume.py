"""`convert` interrupted in every way: killed, disk full, locked out, source changed, hub gone."""

import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_runtime.conversion import convert as module
from moe_runtime.conversion import folders
from moe_runtime.conversion.convert import convert
from moe_runtime.conversion.errors import ConversionError
from moe_runtime.conversion.folders import locked, partial_folder
from moe_runtime.conversion.journal import JOURNAL, Journal
from moe_runtime.conversion.options import ConversionOptions
from tests.loaders.hub_server import COMMIT, ROOT, FakeHub, client_environment, serve
from tests.oracles.tiny_moe import config, stacked, tiny_tensors, write_tiny_moe

SHARD_BYTES = 60_000
NUM_KILLS = 20


@pytest.fixture
def source(tmp_path):
    write_tiny_moe(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def options():
    return ConversionOptions("nvfp4", shard_bytes=SHARD_BYTES)


def content(folder):
    """Hash of every file by name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def run(source, options, name="out", **more):
    output = source.parent / name
    convert(str(source), output, options, progress=False, **more)
    return output


@pytest.fixture(scope="module")
def forks():
    """Ask for a conversion in a fork of its own, which may be killed."""
    command = [sys.executable, "-m", "tests.moe_runtime.convert_child"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:

        def ask(source, output, kill_at=None, overwrite=False):
            request = {
                **{"source": str(source), "output": str(output), "to": "nvfp4"},
                **{"shard_bytes": SHARD_BYTES, "kill_at": kill_at, "overwrite": overwrite},
            }
            print(json.dumps(request), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def test_killed_at_random_moments_it_comes_to_the_same_bytes(source, forks, tmp_path):
    whole = forks(source, tmp_path / "whole")
    assert whole["status"] == 0
    expected = content(tmp_path / "whole")
    moments = random.Random(0).sample(range(1, whole["calls"] + 1), NUM_KILLS)
    for moment in [*moments, 1, 2, 3, whole["calls"]]:
        output = tmp_path / f"killed-{moment}"
        assert forks(source, output, kill_at=moment)["killed"]
        if moment < whole["calls"] - 2:
            assert not output.exists(), "the name appears when the whole is there"
        again = forks(source, output)
        assert again["status"] == 0
        assert content(output) == expected, f"killed at call {moment}"
        assert not partial_folder(output).exists()
        shutil.rmtree(output, ignore_errors=True)


def test_killed_while_it_replaces_a_checkpoint(source, forks, tmp_path):
    """At each of the last calls, renames among them: the new one comes, nothing else stays."""
    old = run(source, ConversionOptions("mxfp8"), name="old")
    shutil.copytree(old, tmp_path / "whole")
    whole = forks(source, tmp_path / "whole", overwrite=True)
    expected = content(tmp_path / "whole")
    for moment in range(whole["calls"] - 7, whole["calls"] + 1):
        output = tmp_path / "out"
        shutil.copytree(old, output)
        assert forks(source, output, kill_at=moment, overwrite=True)["killed"]
        left = {path.name for path in tmp_path.iterdir() if path.name.startswith("out")}
        assert left & {"out", "out.replaced"}, "one of both is always there"
        assert forks(source, output, overwrite=True)["status"] == 0
        assert content(output) == expected, f"killed at call {moment}"
        assert {p.name for p in tmp_path.iterdir() if p.name.startswith("out")} == {"out"}
        shutil.rmtree(output)


def test_killed_again_and_again_it_gets_on(source, forks, tmp_path):
    whole = forks(source, tmp_path / "whole")
    each = whole["calls"] // 2
    output, kills = tmp_path / "out", 0
    while (state := forks(source, output, kill_at=each))["killed"]:
        kills += 1
        assert kills < 10
    assert state["status"] == 0 and kills >= 1
    assert content(output) == content(tmp_path / "whole")


def test_finished_shards_are_not_written_again(source, options, monkeypatch):
    output = run(source, options, name="whole")
    fill_disk_after(monkeypatch, 3)
    with pytest.raises(ConversionError, match="is full"):
        run(source, options)
    monkeypatch.undo()
    partial = partial_folder(source.parent / "out")
    done = Journal.load(partial).done
    times = {name: (partial / name).stat().st_mtime_ns for name in done}
    assert len(done) == 3
    again = run(source, options)
    assert {name: (again / name).stat().st_mtime_ns for name in done} == times
    assert content(again) == content(output)


def fill_disk_after(monkeypatch, shards):
    """Let some shards be finished; the next write finds the disk full."""
    left, pwrite = [shards], os.pwrite

    def add(journal, *arguments, original=Journal.add):
        left[0] -= 1
        original(journal, *arguments)

    def write(*arguments):
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    monkeypatch.setattr(Journal, "add", add)
    monkeypatch.setattr(os, "pwrite", write)


def test_a_torn_journal_costs_its_last_shard(source, options, monkeypatch):
    output = run(source, options, name="whole")
    fill_disk_after(monkeypatch, 3)
    with pytest.raises(ConversionError):
        run(source, options)
    monkeypatch.undo()
    partial = partial_folder(source.parent / "out")
    journal = partial / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-7])
    first = next(iter(Journal.load(partial).done))
    (partial / first).write_bytes(b"short")  # a disk that lied
    assert len(Journal.load(partial).done) == 1
    assert content(run(source, options)) == content(output)


def test_a_disk_that_is_too_small_is_known_before(source, options, monkeypatch):
    fake = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=10_000))
    monkeypatch.setattr(module, "shutil", fake)
    with pytest.raises(ConversionError, match=r"0\.07 GB are still to be written.*0\.00 GB free"):
        run(source, options)
    assert content(partial_folder(source.parent / "out")).keys() == {JOURNAL}


def test_a_folder_that_cannot_be_written(source, options, monkeypatch):
    def mkdir(path, *arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(ConversionError, match="cannot be written: Permission denied"):
        run(source, options)


def test_two_at_once(source, options):
    partial = partial_folder(source.parent / "out")
    with (
        locked(partial),
        pytest.raises(ConversionError, match="another conversion is writing"),
    ):
        run(source, options)
    run(source, options)


def test_the_lock_of_a_folder_that_was_moved_away_does_not_count(tmp_path, monkeypatch):
    partial = tmp_path / "out.partial"
    flock = folders.fcntl.flock

    def late(opened, how):
        partial.rename(tmp_path / "out")
        flock(opened, how)

    monkeypatch.setattr(folders.fcntl, "flock", late)
    with (
        pytest.raises(ConversionError, match="another conversion has just finished"),
        locked(partial),
    ):
        pass


def test_a_source_that_changes(source, options, monkeypatch):
    fill_disk_after(monkeypatch, 2)
    with pytest.raises(ConversionError):
        run(source, options)
    monkeypatch.undo()
    write_tiny_moe(source, tiny_tensors(seed=1))
    with pytest.raises(ConversionError, match="changed since the conversion began") as caught:
        run(source, options)
    assert "--no-resume" in caught.value.hint
    output = run(source, options, resume=False)
    assert content(output) == content(run(source, options, name="fresh"))


def test_a_source_that_changes_while_it_is_read(source, options, monkeypatch):
    def add(journal, *arguments, original=Journal.add):
        os.utime(next(source.glob("*.safetensors")), ns=(1, 1))
        original(journal, *arguments)

    monkeypatch.setattr(Journal, "add", add)
    with pytest.raises(ConversionError, match="changed while it was converted"):
        run(source, options)
    assert not (source.parent / "out").exists()


def test_another_conversion_is_not_continued(source, options, monkeypatch):
    fill_disk_after(monkeypatch, 1)
    with pytest.raises(ConversionError):
        run(source, options)
    monkeypatch.undo()
    with pytest.raises(ConversionError, match="unfinished conversion with other options"):
        run(source, ConversionOptions("mxfp4"))
    run(source, ConversionOptions("mxfp4"), resume=False)


def test_a_folder_that_is_not_ours_is_left_alone(source, options):
    partial = partial_folder(source.parent / "out")
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    for resume in (True, False):
        with pytest.raises(ConversionError, match=r"holds thesis\.txt and no journal"):
            run(source, options, resume=resume)


def test_a_finished_conversion_is_not_done_again(source, options):
    output = run(source, options)
    times = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    run(source, options)
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == times


def test_a_finished_conversion_whose_source_has_changed(source, options):
    """The report of the old weights must not pass for one of the new."""
    before = content(run(source, options))
    write_tiny_moe(source, tiny_tensors(seed=1))
    with pytest.raises(ConversionError, match="a source that has changed since") as caught:
        run(source, options)
    assert "--overwrite" in caught.value.hint
    after = content(run(source, options, overwrite=True))
    assert after == content(run(source, options, name="fresh")) != before


def test_a_finished_conversion_that_was_damaged(source, options):
    output = run(source, options)
    expected = content(output)
    shard = sorted(output.glob("model-*.safetensors"))[1]
    for damage in (lambda: shard.write_bytes(b"short"), shard.unlink):
        damage()
        with pytest.raises(ConversionError, match=f"{shard.name}: expected the .* bytes that were"):
            run(source, options)
        assert content(run(source, options, overwrite=True)) == expected


def test_killed_after_the_move_it_tidies_up(source, options, monkeypatch):
    """With --overwrite too: what is whole is not converted again, what it replaced goes."""
    run(source, ConversionOptions("mxfp8"))
    monkeypatch.setattr(folders, "_tidy_up", lambda output: None)
    output = run(source, options, overwrite=True)
    monkeypatch.undo()
    left = {path.name for path in output.parent.iterdir()}
    assert left >= {"out", "out.replaced"} and (output / JOURNAL).exists()
    times = {path: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
    run(source, options, overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert not (output / JOURNAL).exists()
    assert {path.name for path in output.parent.iterdir()} == left - {"out.replaced"}


def test_a_home_folder_is_a_home_folder(source, options, monkeypatch):
    monkeypatch.setenv("HOME", str(source.parent))
    convert(str(source), Path("~/at-home"), options, progress=False)
    assert (source.parent / "at-home" / "config.json").is_file()


def test_a_link_leads_to_another_folder(source, options, tmp_path):
    """Everything is written where the link leads, and the link stays."""
    for name in ("there", "not-yet"):
        link, target = tmp_path / f"link-to-{name}", tmp_path / "elsewhere" / name
        target.parent.mkdir(exist_ok=True)
        if name == "there":
            target.mkdir()
        link.symlink_to(target)
        convert(str(source), link, options, progress=False)
        assert link.is_symlink() and (target / "config.json").is_file()


def test_the_folder_one_is_in(source, options, tmp_path, monkeypatch):
    monkeypatch.chdir(source)
    with pytest.raises(ConversionError, match="is the source itself"):
        convert(str(source), Path("."), options, progress=False)
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    convert(str(source), Path("."), options, progress=False)
    assert (tmp_path / "inside" / "config.json").is_file()


def test_memory_is_bounded(tmp_path):
    """A stacked tensor of 200 MB in fp32 is converted where less than a third of that is free."""
    code = """
import resource, sys
from pathlib import Path
import torch
from moe_runtime.conversion import work
from moe_runtime.conversion.convert import convert
from moe_runtime.conversion.options import ConversionOptions
work.CHUNK_WEIGHTS = 1 << 16
def status(key):
    return 1024 * int(Path("/proc/self/status").read_text().partition(key)[2].split()[0])
small, output, large, spare = *sys.argv[1:4], int(sys.argv[4])
convert(small, Path(output + "-small"), ConversionOptions("mxfp4"), progress=False)
before, limit = status("VmHWM:"), status("VmData:") + spare
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    torch.empty(2 * spare, dtype=torch.uint8)
    print("the limit is not enforced")
except RuntimeError:
    convert(large, Path(output), ConversionOptions("mxfp4"), progress=False)
    print(status("VmHWM:") - before)
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux's /proc")
    tensors = stacked(tiny_tensors(d=512, f=12288, layers=1))
    write_tiny_moe(tmp_path / "large", tensors, settings=config(d=512, f=12288, layers=1))
    write_tiny_moe(tmp_path / "small")
    decoded = 4 * tensors["model.layers.0.mlp.experts.gate_up_proj"].numel()
    assert decoded > 200_000_000
    arguments = [str(tmp_path / name) for name in ("small", "out", "large")]
    told = subprocess.run(
        [sys.executable, "-c", code, *arguments, str(decoded // 3)],
        cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    if "not enforced" in told.stdout:
        pytest.skip("this system does not enforce RLIMIT_DATA")
    assert int(told.stdout) < decoded / 3


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 80 MB, in memory, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_in_earnest(source, small_disk, monkeypatch):
    """Another program takes the space after two shards; when it is gone the same call goes on."""
    options = ConversionOptions("nvfp4", shard_bytes=SHARD_BYTES // 2)
    whole = run(source, options, name="whole")
    ballast, output = small_disk / "ballast", small_disk / "out"
    partial = partial_folder(output)

    def pwrite(*arguments, original=os.pwrite):
        if len(list(partial.glob("model-*.safetensors"))) == 2 and not ballast.exists():
            with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(1 << 20)):
                    pass
        return original(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ConversionError, match=r"the disk of .* is full") as caught:
        convert(str(source), output, options, progress=False, threads=1)
    assert "goes on where it stopped" in caught.value.hint
    monkeypatch.undo()
    assert len(Journal.load(partial).done) == 2
    ballast.unlink()
    convert(str(source), output, options, progress=False)
    assert content(output) == content(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_file_system_with_a_limit_on_files(source, tmp_path):
    """One clear line and exit status 1; smaller files are what helps."""
    command = [sys.executable, "-m", "moe_runtime", "convert", str(source), "--to", "nvfp4"]
    command += ["--output", str(tmp_path / "out")]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD_BYTES // 2,) * 2)

    told = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, preexec_fn=limit)
    assert told.returncode == 1
    assert "larger than its file system" in told.stderr and "--shard-size" in told.stderr
    assert "Traceback" not in told.stderr


@pytest.fixture
def hub(source):
    # shards of more than the 100 kB in which headers are read
    write_tiny_moe(source, tiny_tensors(d=256, f=128), settings=config(d=256, f=128))
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    with serve(FakeHub(repos={"acme/tiny": files})) as running:
        yield running


def convert_from_hub(hub, output, cache, *options, wait=True, status=0):
    command = [sys.executable, "-m", "moe_runtime", "convert", "acme/tiny", *options]
    command += ["--to", "nvfp4", "--shard-size", "60kB", "--output", str(output)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=client_environment(hub, cache), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    if not wait:
        return process
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    return errors


def wait_for_part(folder):
    """Until a file with bytes of a shard is there: what was sent may not have been written yet."""
    until = time.monotonic() + 60
    while not any(path.stat().st_size for path in folder.glob("*.incomplete")):
        assert time.monotonic() < until, "nothing arrived"
        time.sleep(0.02)


def weights(folder):
    return {name: digest for name, digest in content(folder).items() if "model" in name}


def test_from_the_hub_a_shard_at_a_time_and_after_a_kill(source, hub, options, tmp_path):
    """The second shard hangs in the middle; killed there, the next run goes on from that byte."""
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    hub.hang_after[shards[1]] = 300_000
    output, cache = tmp_path / "from-hub", tmp_path / "cache"
    process = convert_from_hub(hub, output, cache, wait=False)
    assert hub.hanging.wait(60)
    wait_for_part(tmp_path / "from-hub.partial" / "source_shards")
    process.kill()
    process.communicate()
    here = [path.name for path in (tmp_path / "from-hub.partial" / "source_shards").iterdir()]
    assert len([name for name in here if "." not in name]) <= 2
    hub.hang_after.clear()
    hub.released.set()
    convert_from_hub(hub, output, cache)
    assert weights(output) == weights(run(source, options))
    resumed = [r for r in hub.ranges(shards[1]) if r and not r.startswith("bytes=0-")]
    assert resumed, "what had arrived was not fetched again"
    assert not (output / "source_shards").exists()
    assert "base_model: acme/tiny" in (output / "README.md").read_text()


def test_dropped_connections_are_taken_up_again(source, hub, options, tmp_path):
    for name in hub.repos["acme/tiny"]:
        if name.endswith(".safetensors"):
            hub.drop_after[name] = [100_000, 150_000, 50_000]
    convert_from_hub(hub, tmp_path / "from-hub", tmp_path / "cache")
    assert weights(tmp_path / "from-hub") == weights(run(source, options))


def test_a_revision_and_bytes_of_the_hub_are_what_they_say(hub, tmp_path):
    """A shard whose hash is not the hub's is refused; a revision goes into report and card."""
    output, cache = tmp_path / "from-hub", tmp_path / "cache"
    errors = convert_from_hub(hub, output, cache, "--revision", "no-such", status=1)
    assert "no-such" in errors and "Traceback" not in errors
    shard = next(name for name in hub.repos["acme/tiny"] if name.endswith(".safetensors"))
    hub.corrupt.add(shard)
    errors = convert_from_hub(hub, output, cache, "--revision", COMMIT, status=1)
    assert (
        re.search(rf"error: .*{shard}.*(hash|sha256|bytes)", errors) and "Traceback" not in errors
    )
    assert not output.exists()
    hub.corrupt.clear()
    convert_from_hub(hub, output, cache, "--revision", COMMIT)
    assert json.loads((output / "conversion_report.json").read_text())["meta"]["revision"] == COMMIT
    assert f"acme/tiny at {COMMIT}" in (output / "README.md").read_text()
