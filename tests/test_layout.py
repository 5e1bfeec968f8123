"""The shape of the project, read from its source: import directions, doors, names, the wheel."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ALLOWED = {  # each folder imports only the folders below it
    "quant": set(),
    "kernels": {"quant"},
    "loaders": {"quant"},
    "moe_runtime": {"quant", "kernels", "loaders"},
}
DOORS = {"triton": "kernels", "safetensors": "loaders", "huggingface_hub": "loaders"}
DEPENDENCIES = {
    "torch",
    "triton",
    "safetensors",
    "huggingface_hub",
    "einops",
    "tokenizers",
    "jinja2",
    "click",
    "tqdm",
}
# Modules of Hugging Face's package `kernels`, which shares the folder with ours when both are
# installed.
TAKEN_KERNEL_NAMES = {
    *("archs", "backends", "benchmark", "benchmarks", "cli", "compat", "deps", "hf_hub"),
    *("importer", "install", "layer", "load", "locking", "python_deps", "resolver", "status"),
    *("validate", "variants", "verify"),
}


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full module name of every import in a file, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "" if node.level == 0 else ""


def imported_packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for _, name in imports_of(path)} - {""}


def violations(root: Path) -> list[str]:
    """Every import that goes up, through another folder's door, or to an undeclared package."""
    found = []
    known = DEPENDENCIES | ALLOWED.keys() | set(sys.stdlib_module_names)
    for package, allowed in ALLOWED.items():
        for path in sorted((root / package).rglob("*.py")):
            names = imported_packages(path)
            up = names & ALLOWED.keys() - {package} - allowed
            doors = {name for name in names & DOORS.keys() if DOORS[name] != package}
            found += [
                f"{path.relative_to(root)} imports {name}"
                for name in sorted(up | doors | (names - known))
            ]
    return found


def test_each_folder_imports_only_what_it_may():
    assert violations(ROOT) == []
    assert all(list((ROOT / package).rglob("*.py")) for package in ALLOWED)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("quant/a.py", "import kernels.gemv"),
        ("kernels/a.py", "from loaders import hub"),
        ("loaders/a.py", "def f():\n    from moe_runtime.config import ModelConfig"),
        ("moe_runtime/models/a.py", "import triton.language as tl"),
        ("moe_runtime/a.py", "from safetensors.torch import load_file"),
        ("kernels/a.py", "import huggingface_hub"),
        ("loaders/a.py", "import numpy"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line)
    assert len(violations(tmp_path)) == 1


def test_imports_inside_functions_say_why():
    unexplained = []
    for package in ALLOWED:
        for path in sorted((ROOT / package).rglob("*.py")):
            lines = path.read_text().splitlines()
            for line, name in imports_of(path):
                near = "".join(lines[max(0, line - 4) : line])  # the import and what is above it
                explained = "#" in near or "TYPE_CHECKING" in near
                if lines[line - 1].startswith("    ") and not explained:
                    unexplained.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert unexplained == []


def test_only_moe_runtime_is_a_regular_package():
    """quant, kernels and loaders share their names with other distributions: see pyproject.toml."""
    found = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/__init__.py")}
    assert found & (ALLOWED.keys() | {"tests", "benchmarks", "tools"}) == {"moe_runtime"}


def test_no_kernel_file_takes_a_name_of_the_other_kernels_package():
    ours = {path.stem for path in (ROOT / "kernels").iterdir() if path.stem != "__pycache__"}
    assert not ours & (TAKEN_KERNEL_NAMES | hf_kernels_modules())


def hf_kernels_files() -> list[Path]:
    """Files of the installed Hugging Face distribution `kernels`, relative to its site folder."""
    try:
        distribution = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(file) for file in distribution.files or [] if file.parts[0] == "kernels"]


def hf_kernels_modules() -> set[str]:
    return {file.parts[1].removesuffix(".py") for file in hf_kernels_files()} - {"__init__"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Our wheel, built from a copy so that the checkout stays clean."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    for path in source_files():
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def source_files() -> Iterator[Path]:
    for folder in (*ALLOWED, "tests", "benchmarks", "tools"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path
    yield from (ROOT / name for name in ("pyproject.toml", "README.md"))


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == set(ALLOWED)
    for folder in ALLOWED:
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert sources <= names, f"missing: {sorted(sources - names)}"
    assert "moe_runtime/py.typed" in names
    demo = {f"moe_runtime/demo/{path.name}" for path in (ROOT / "moe_runtime/demo").glob("*")}
    assert demo <= names


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "ours second"])
@pytest.mark.parametrize("other", ["stand-in", "installed"])
def test_lives_beside_the_other_kernels_package(wheel, tmp_path, ours_first, other):
    """Hugging Face's `kernels` is a regular package; both must import from one site folder."""
    if other == "installed" and not hf_kernels_files():
        pytest.skip("needs Hugging Face's package: pip install kernels")
    theirs = stand_in if other == "stand-in" else copy_installed
    for install in [unpack, theirs] if ours_first else [theirs, unpack]:
        install(wheel, tmp_path)
    code = """
import sys, pathlib
site = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(site))
import kernels, moe_runtime.cli, quant.formats, loaders.errors
assert kernels.get_kernel and pathlib.Path(kernels.__file__).parent == site / "kernels"
import kernels.layer, kernels.reference.read_bandwidth
from importlib.util import find_spec
for path in sys.argv[2].split():
    assert find_spec("kernels." + path), path
for module in (kernels.reference.read_bandwidth, moe_runtime.cli, quant.formats, loaders.errors):
    assert pathlib.Path(module.__file__).is_relative_to(site), module
print("both")
"""
    modules = " ".join(path.stem for path in (ROOT / "kernels").glob("*.py"))
    arguments = [sys.executable, "-c", code, str(tmp_path), modules]
    result = subprocess.run(arguments, text=True, capture_output=True, cwd=tmp_path)
    assert result.stdout == "both\n", result.stderr


def unpack(wheel: Path, site: Path) -> None:
    """What pip does with a wheel of plain Python files."""
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if (site / name).is_file()]
        archive.extractall(site)


def stand_in(wheel: Path, site: Path) -> None:
    """A regular package with the module names of Hugging Face's."""
    folder = site / "kernels"
    folder.mkdir(exist_ok=True)
    for name in TAKEN_KERNEL_NAMES | {"__init__"}:
        assert not (folder / f"{name}.py").exists()
        (folder / f"{name}.py").write_text("get_kernel = print\n")


def copy_installed(wheel: Path, site: Path) -> None:
    """The installed distribution, as another installation would lay it down."""
    distribution = importlib.metadata.distribution("kernels")
    for file in hf_kernels_files():
        target = site / file
        assert not target.exists()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path(str(distribution.locate_file(file))).read_bytes())
