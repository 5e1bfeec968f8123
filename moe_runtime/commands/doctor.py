"""`moe-runtime doctor`: what this machine has and what runs on it, to read or to paste."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe_runtime import __version__
from moe_runtime.commands.common import (
    device_option,
    json_option,
    print_json,
    revision_option,
    verb,
)
from moe_runtime.commands.headers import open_headers
from moe_runtime.errors import DoesNotFitError
from moe_runtime.host_memory import free_host_bytes
from moe_runtime.plan import MoreBytes, fit
from moe_runtime.published import PUBLISHED, PublishedModel
from moe_runtime.support import SUPPORTED

if TYPE_CHECKING:
    from moe_runtime.warm_up import WarmUp

PACKAGES = ("torch", "triton", "huggingface_hub", "safetensors", "tokenizers", "numpy")


@verb(
    "doctor",
    examples="""
    moe-runtime doctor
    moe-runtime doctor --json > doctor.json
    moe-runtime doctor --warm-up
    moe-runtime doctor --warm-up openai/gpt-oss-120b
    """,
)
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--warm-up", "warms_up", is_flag=True,
              help="Compile the kernels of MODEL, or of the published models, ahead.")  # fmt: skip
@click.option("--max-context", type=click.IntRange(min=1), metavar="N",
              help="With --warm-up: as the model will be opened with.")  # fmt: skip
@revision_option
@device_option
@json_option
def command(
    model: str | None,
    warms_up: bool,
    max_context: int | None,
    revision: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Show what this machine has and what runs on it, and why the rest does not.

    Measures how fast memory is read, which bounds tokens a second. Nothing is sent anywhere and
    no secret is shown: the output can be pasted into an issue.

    With --warm-up it compiles kernels for this GPU instead, on all processors, into Triton's
    cache, so that opening a model finds them there.
    """
    if warms_up:
        _warm_up(model, revision, device, max_context, as_json)
        return
    if model or max_context or revision:
        raise click.UsageError("MODEL, --revision and --max-context need --warm-up")
    report = {name: _attempt(probe) for name, probe in PROBES.items()}
    if as_json:
        print_json(report)
    else:
        click.echo("\n".join(line for name in report for line in _section(name, report[name])))


def _warm_up(
    model: str | None, revision: str | None, device: str, max_context: int | None, as_json: bool
) -> None:
    """Compile ahead, with a line for each model and dense format as soon as it is done."""
    import torch  # slow import

    # Slow imports: torch and triton.
    from moe_runtime.backends import parse_device
    from moe_runtime.warm_up import known_models, model_of, warm_up

    if not torch.cuda.is_available():
        raise click.ClickException("kernels are compiled for a GPU: torch sees none here")
    target = parse_device("cuda" if device == "auto" else device)
    if target.type != "cuda":
        raise click.UsageError(f"--warm-up compiles for a GPU, got --device {device}")
    if model is None:
        models = known_models()
    else:
        with open_headers(model, revision) as checkpoint:
            models = [model_of(model, checkpoint)]
    found = []
    with torch.cuda.device(target):
        for one in models:
            for done in warm_up(one, target, max_context=max_context):
                found.append(asdict(done))
                if not as_json:
                    click.echo(describe_warm_up(done))
    if as_json:
        print_json(found)


def describe_warm_up(done: WarmUp) -> str:
    """One line."""
    what = f"{done.model}, dense {done.dense_format}"
    if done.why_not:
        return f"{what}: left out: {done.why_not}"
    made = f"{done.kernels} kernels in {done.seconds:.1f} s"
    return f"{what}, context of {done.max_context} tokens: {made}"


def probe_versions() -> dict[str, str]:
    """Versions of ourselves, Python, the system and the packages that matter."""
    found = {
        "moe_runtime": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def probe_gpus() -> list[dict[str, Any]]:
    """Each visible GPU with its free memory; one entry with the reason when there is none."""
    import torch  # slow import

    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return [{"none": f"torch sees no GPU (torch {torch.__version__} is built {built})"}]
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "free_bytes": free,
                "total_bytes": total,
                "cuda": torch.version.cuda,
            }
        )
    return gpus


def probe_bandwidth() -> list[dict[str, Any]]:
    """Measured read bandwidth of each GPU, or of host memory when there is none."""
    import torch  # slow import

    from kernels.read_bandwidth import read_bandwidth  # triton may be missing: reported here

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [f"cuda:{index}" for index in range(count)] or ["cpu"]
    found = []
    for device in devices:
        measured = asdict(read_bandwidth(device))
        found.append({"device": device, "read_gbps": measured.pop("gbps"), **measured})
    return found


def probe_memory() -> dict[str, Any]:
    """Host memory and processors."""
    import torch  # slow import

    page = os.sysconf("SC_PAGE_SIZE")
    return {
        "total_bytes": page * os.sysconf("SC_PHYS_PAGES"),
        "free_bytes": free_host_bytes(),
        "processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def probe_caches() -> list[dict[str, Any]]:
    """Where downloads and compiled kernels go, with the disk space left there."""
    from loaders.hub import hub_settings  # slow import: huggingface_hub

    triton = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    folders = {"hub": hub_settings().cache, "triton": Path(triton)}
    return [
        {"what": what, "folder": str(folder), "exists": folder.is_dir(), **_disk(folder)}
        for what, folder in folders.items()
    ]


def probe_hub() -> dict[str, Any]:
    """The hub's address, whether it may be asked, whether a token is there."""
    from loaders.hub import hub_settings  # slow import: huggingface_hub

    settings = hub_settings()
    return {
        "endpoint": settings.endpoint,
        "offline": settings.offline,
        "token": "present" if settings.has_token else "none",
    }


def probe_support() -> list[dict[str, Any]]:
    """Every combination this version has, and whether it runs here."""
    import torch  # slow import

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    capabilities = [torch.cuda.get_device_capability(index) for index in range(count)]
    triton_problem = _triton_problem()
    rows = []
    for row in SUPPORTED:
        reason = row.why_not(capabilities, triton_problem)
        entry = {"family": row.family, "experts": row.experts, "dense": row.dense}
        entry["backend"] = row.backend
        said = {"why_not": reason} if reason else {}
        rows.append({**entry, "runs": reason is None, **said})
    return rows


def probe_models() -> list[dict[str, Any]]:
    """Whether the published models fit the free memory of each GPU, or of the host without one."""
    import torch  # slow import

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        free = free_host_bytes()
        return [_fits_host(model, free) for model in PUBLISHED]
    cuda = torch.cuda
    gpus = [
        (f"cuda:{index}", cuda.mem_get_info(index)[0], cuda.get_device_capability(index))
        for index in range(count)
    ]
    return [fits_gpu(model, *gpu) for model in PUBLISHED for gpu in gpus]


def fits_gpu(
    model: PublishedModel, device: str, free_bytes: int, capability: tuple[int, int]
) -> dict[str, Any]:
    """The longest context that fits a GPU with free_bytes, or what is missing."""
    from moe_runtime.tiles import HOPPER, more_bytes  # torch: slow import
    from quant.formats import MXFP4

    entry: dict[str, Any] = {"model": model.repo_id, "device": device}
    try:
        plan = fit(
            model.config,
            model.weight_bytes,
            max_context=None,
            free_bytes=free_bytes,
            device=device,
            more=more_bytes(model.config, MXFP4, fp8=False)
            if capability == HOPPER
            else MoreBytes(),
        )
    except DoesNotFitError as error:
        return {**entry, "fits": False, "why_not": error.hint}
    return {**entry, "fits": True, "context": plan.max_context, "needs_bytes": plan.total_bytes}


def _fits_host(model: PublishedModel, free_bytes: int) -> dict[str, Any]:
    needed = sum(model.weight_bytes.values())
    fits = needed < free_bytes
    return {"model": model.repo_id, "device": "cpu", "fits": fits, "needs_bytes": needed}


PROBES: dict[str, Callable[[], Any]] = {
    "versions": probe_versions,
    "gpus": probe_gpus,
    "read_bandwidth": probe_bandwidth,
    "host_memory": probe_memory,
    "caches": probe_caches,
    "hub": probe_hub,
    "support": probe_support,
    "models": probe_models,
}


def _attempt(probe: Callable[[], Any]) -> Any:
    """The probe's findings, or what went wrong: a doctor that fails is of no use."""
    try:
        return probe()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _triton_problem() -> str | None:
    try:
        importlib.import_module("kernels.read_bandwidth")
    except Exception as error:
        return f"triton does not import: {type(error).__name__}: {error}"
    return None


def _disk(folder: Path) -> dict[str, int]:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return {"free_bytes": shutil.disk_usage(existing).free}


def _section(name: str, findings: Any) -> list[str]:
    """A heading, then a line for each entry of a list or each key of a mapping."""
    lines = [name.replace("_", " ")]
    if isinstance(findings, dict):
        width = max(len(_label(key)) for key in findings)
        lines += [f"  {_label(key):{width}}  {_value(key, findings[key])}" for key in findings]
        return [*lines, ""]
    for entry in findings:
        title, *fields = entry.items()
        shown = [f"{_label(key)} {_value(key, value)}" for key, value in fields]
        lines.append(f"  {title[1]}" + (": " if shown else "") + ", ".join(shown))
    return [*lines, ""]


def _label(key: str) -> str:
    if key == "moe_runtime" or key in PACKAGES:
        return key
    return key.removesuffix("_bytes").removesuffix("_gbps").replace("_", " ")


def _value(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB"
    if key.endswith("_gbps"):
        return f"{value:.0f} GB/s"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
