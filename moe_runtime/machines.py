"""GPUs by name: memory and read bandwidth, to say what a model would do on one that is not here.

Memory is what nvidia-smi lists. Bandwidth of the data sheet is never reached: where we measured
reads (`moe-runtime doctor` does) that figure counts, else MEASURED_SHARE of the sheet's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# H100 SXM 3.10 of 3.35 TB/s, H200 4.49 of 4.80: 92.5 % and 93.5 %. The lower one, rounded down.
MEASURED_SHARE = 0.92


@dataclass(frozen=True)
class Machine:
    """One GPU: what bounds the size of a model and its speed."""

    name: str
    memory_bytes: int
    read_gbps: float  # 10^9 bytes a second
    source: str  # of read_gbps, in words
    capability: tuple[int, int]  # compute capability


@dataclass(frozen=True)
class GpuRow:
    """One row of the table."""

    key: str  # what --gpu takes
    name: str
    capability: tuple[int, int]
    memory_mib: int
    sheet_gbps: float
    measured_gbps: float | None = None

    @property
    def machine(self) -> Machine:
        """The row with the figures that count."""
        gbps, source = self.measured_gbps, "measured on one before"
        if gbps is None:
            share = round(100 * MEASURED_SHARE)
            gbps = MEASURED_SHARE * self.sheet_gbps
            source = f"{share} % of the data sheet's {self.sheet_gbps:.0f} GB/s, not measured"
        return Machine(self.name, self.memory_mib << 20, gbps, source, self.capability)


GPUS = (
    GpuRow("b200", "NVIDIA B200", (10, 0), 183359, 8000.0),
    GpuRow("h200", "NVIDIA H200", (9, 0), 143771, 4800.0, 4490.0),
    GpuRow("h100-nvl", "NVIDIA H100 NVL", (9, 0), 95830, 3938.0),
    GpuRow("h100", "NVIDIA H100 80GB HBM3", (9, 0), 81559, 3352.0, 3100.0),
    GpuRow("h100-pcie", "NVIDIA H100 PCIe", (9, 0), 81559, 2039.0),
    GpuRow("a100-80gb", "NVIDIA A100-SXM4-80GB", (8, 0), 81920, 2039.0),
    GpuRow("a100-40gb", "NVIDIA A100-SXM4-40GB", (8, 0), 40960, 1555.0),
    GpuRow("rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell", (12, 0), 97887, 1792.0),
    GpuRow("rtx-6000-ada", "NVIDIA RTX 6000 Ada", (8, 9), 49140, 960.0),
    GpuRow("rtx-a6000", "NVIDIA RTX A6000", (8, 6), 49140, 768.0),
    GpuRow("l40s", "NVIDIA L40S", (8, 9), 46068, 864.0),
    GpuRow("l4", "NVIDIA L4", (8, 9), 23034, 300.0),
    GpuRow("a10", "NVIDIA A10", (8, 6), 23028, 600.0),
    GpuRow("rtx-5090", "NVIDIA GeForce RTX 5090", (12, 0), 32607, 1792.0),
    GpuRow("rtx-4090", "NVIDIA GeForce RTX 4090", (8, 9), 24564, 1008.0),
    GpuRow("rtx-3090", "NVIDIA GeForce RTX 3090", (8, 6), 24576, 936.0),
)
DEFAULT_GPU = "h100"  # where there is no GPU and none is named


def find_gpu(name: str) -> Machine:
    """The GPU that a user names by key or full name; case, spaces and hyphens do not matter.

    Raises ValueError naming those that there are.
    """
    wanted = _plain(name)
    for row in GPUS:
        if wanted in (_plain(row.key), _plain(row.name), _plain(row.name.removeprefix("NVIDIA "))):
            return row.machine
    known = ", ".join(row.key for row in GPUS)
    raise ValueError(f"there is no GPU named {name!r} in the table: expected one of {known}")


def gpu_here() -> Machine | None:
    """The current CUDA device with its bandwidth measured now; None when there is no GPU."""
    import torch  # slow import

    if not torch.cuda.is_available():
        return None
    from kernels.read_bandwidth import read_bandwidth  # triton: needed where there is a GPU

    index = torch.cuda.current_device()
    _, total_bytes = torch.cuda.mem_get_info(index)
    measured = read_bandwidth(f"cuda:{index}").gbps
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return Machine(name, total_bytes, measured, "measured now", capability)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
