"""Muon for the matrices and AdamW for the rest: the two optimizers of the demo training.

Muon steps along the momentum with its singular values pulled towards 1 (Jordan et al., 2024). All
matrices of one shape, over layers and experts, are orthogonalised in one batched product.
"""

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz coefficients of the published Muon.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


class Muon:
    """Nesterov momentum, orthogonalised; weight decay decoupled."""

    def __init__(
        self, parameters: list[nn.Parameter], *, learning_rate: float, weight_decay: float
    ):
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in parameters:
            shape = (parameter.shape[-2], parameter.shape[-1])
            self.groups.setdefault(shape, []).append(parameter)
        self.momenta: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def step(self, scale: float, momentum: float) -> None:
        """One step at scale * the peak learning rate."""
        rate = scale * self.learning_rate
        for (rows, columns), parameters in self.groups.items():
            gradient = torch.cat([_gradient(p).reshape(-1, rows, columns) for p in parameters])
            buffer = self.momenta.setdefault((rows, columns), torch.zeros_like(gradient))
            buffer.lerp_(gradient, 1 - momentum)
            update = orthogonalise(gradient.lerp_(buffer, momentum))
            update = update.float() * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(list[Tensor](parameters), 1 - rate * self.weight_decay)
            parts = update.split([p.numel() // (rows * columns) for p in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.add_(part.view_as(parameter), alpha=-rate)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def orthogonalise(matrices_Nrc: Tensor) -> Tensor:
    """Singular values of each matrix to about 1, in bf16."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices_Nrc.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def adamw(groups: list[dict], device: torch.device) -> torch.optim.AdamW:
    """AdamW whose groups keep their peak rate; `set_rate` scales all of them."""
    for group in groups:
        group["peak_rate"] = group["lr"]
    return torch.optim.AdamW(
        groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=device.type == "cuda"
    )


def set_rate(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Every group to scale * its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = scale * group["peak_rate"]
