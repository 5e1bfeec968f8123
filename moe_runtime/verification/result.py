"""What a verification found, as plain data and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quant.quality import TensorQuality, merge


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth a look."""

    check: str  # "files", "names", "config", "numbers", "scales", "gate and up" or "source"
    message: str
    tensor: str = ""
    is_error: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "severity": "error" if self.is_error else "warning",
            "check": self.check,
            "tensor": self.tensor,
            "message": self.message,
        }


@dataclass(frozen=True)
class CheckedTensor:
    """One weight: what it is, and how it compares with the source's."""

    name: str
    component: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    equal: bool | None = None  # bit for bit the source's; None: not compared
    quality: TensorQuality | None = None  # against the source; None where equal or not compared

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        quality = None if self.quality is None else self.quality.as_dict()
        return {**self.__dict__, "shape": list(self.shape), "quality": quality}


@dataclass(frozen=True)
class Verification:
    """The whole result."""

    findings: tuple[Finding, ...]
    tensors: tuple[CheckedTensor, ...] = ()
    compared: bool = False  # whether there was a source
    seconds: float = 0.0
    bytes_read: int = 0  # of both

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong; warnings aside."""
        return not any(finding.is_error for finding in self.findings)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def components(self) -> dict[str, list[CheckedTensor]]:
        """Tensors by component and format, in the order of the files."""
        groups: dict[str, list[CheckedTensor]] = {}
        for tensor in self.tensors:
            groups.setdefault(f"{tensor.component} ({tensor.format})", []).append(tensor)
        return groups

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "sound": self.sound,
            "compared": self.compared,
            "num_tensors": len(self.tensors),
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "bytes_read": self.bytes_read,
            "findings": [finding.as_dict() for finding in self.findings],
            "components": [
                {"component": name, **summary(group)} for name, group in self.components().items()
            ],
            "tensors": [tensor.as_dict() for tensor in self.tensors],
        }


def summary(tensors: list[CheckedTensor]) -> dict[str, Any]:
    """Counts of a group of tensors, and their merged quality."""
    measured = [tensor.quality for tensor in tensors if tensor.quality is not None]
    return {
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "equal": sum(tensor.equal is True for tensor in tensors),
        "quality": merge(measured).as_dict() if measured else None,
    }
