"""The reference and the triton backend over the same tiny weights, for Triton's interpreter.

The interpreter gets bf16 arithmetic wrong, so plain weights and the cache are fp32 here. Experts in
FP8 become bf16, which kernels decode themselves, because its FP8 is slow; tests/kernels has stacks
in FP8. FP4 stays.
"""

import torch
from triton.runtime.interpreter import GridExecutor

from loaders.checkpoint import open_folder
from loaders.weights import load_weights
from moe_runtime.gpu.families import GPU_FAMILIES
from moe_runtime.models.reference_model import decoded
from moe_runtime.models.registry import plan_model
from moe_runtime.plan import MemoryPlan, weights_by_component
from moe_runtime.reference_backend import ReferenceBackend
from moe_runtime.triton_backend import TritonBackend
from quant.tensor import QuantTensor

CPU = torch.device("cpu")
CONTEXT = 64


def is_expert(name):
    return name.endswith(("gate_up", "down", "gate", "up")) and "compressor" not in name


def load(folder):
    checkpoint = open_folder(folder)
    opened = plan_model(checkpoint)
    config = opened.config
    weights = load_weights(
        checkpoint, opened.table, config.dims, config.num_layers, device="cpu", progress=False
    )
    return opened, weights


def make_pair(folder, context=CONTEXT):
    """The reference and the kernels, over the same weights."""
    opened, weights = load(folder)
    for name in filter(is_expert, weights):
        weight = weights[name]
        if not isinstance(weight, QuantTensor) or weight.format.value_bits > 4:
            weights[name] = decoded(weight).bfloat16()
    plan = MemoryPlan(opened.config, weights_by_component(opened.plan.nbytes), context)
    reference = ReferenceBackend(opened.family.reference(opened.config, weights, CPU), plan)
    wide = {name: widened(name, weight) for name, weight in weights.items()}
    return reference, TritonBackend(opened.config, wide, plan, CPU, cache_dtype=torch.float32)


def widened(name, weight):
    plain = isinstance(weight, torch.Tensor) and weight.is_floating_point()
    return weight.float() if plain and not is_expert(name) else weight


def flat(thing):
    """All weights of a layer in order."""
    if thing is None or isinstance(thing, (torch.Tensor, QuantTensor)):
        return [thing]
    parts = thing if isinstance(thing, tuple) else vars(thing).values()
    return [weight for part in parts for weight in flat(part)]


def form(weight):
    if isinstance(weight, QuantTensor):
        return weight.format, weight.shape, weight.scales.dtype, weight.scales.shape[1:]
    return None if weight is None else (weight.dtype, weight.shape)


def check_components_of_launches(step, monkeypatch):
    """Of tensors that are known, a launch reads those of one component: `named` may take any."""
    names = GPU_FAMILIES[step.config.family].parts.components(step)
    found = []

    def catch(self, *arguments, **options):
        if "trace_ptr" in self.arg_names:
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            known = {names[t.data_ptr()] for t in tensors if t.data_ptr() in names}
            found.append((self.fn.__name__, *known))

    monkeypatch.setattr(GridExecutor, "__call__", catch)
    step.step(filtered=False)
    assert all(len(launch) == 2 for launch in found), found
    assert {component for _, component in found} == set(names.values())
