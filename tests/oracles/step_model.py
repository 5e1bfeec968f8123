"""A random GPT-OSS of two layers for the persistent step: its weights, and logits by the twins."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.persistent.formats import EXPERT_TILES
from kernels.persistent.launch import StepBuffers, StepWeights, pack_router
from kernels.persistent.pack import mixed_projection, pack_dense, pack_experts
from kernels.persistent.sizes import StepSizes
from quant.codecs import decode, encode
from quant.formats import FP8_ROW, MXFP4, QuantFormat
from quant.tensor import QuantTensor

TINY = StepSizes(
    layers=2, width=192, heads=4, kv_heads=2, head_width=64, experts=5, top_k=4, hidden=96,
    vocabulary=200, window=128, eps=1e-5, limit=7.0, alpha=1.702, fp8=False, programs=9, splits=4,
    expert_slots=5, single=150,
)  # fmt: skip


@dataclass
class StepModel:
    sizes: StepSizes
    layers: list[dict[str, Tensor | QuantTensor]]
    embedding: Tensor
    head: Tensor | QuantTensor
    final_norm: Tensor
    weights: StepWeights
    buffers: StepBuffers
    rope: tuple[Tensor, Tensor]
    cache: Tensor
    table: Tensor
    slots: list[int]


def step_model(
    sizes: StepSizes = TINY, *, fp8: bool, device: str = "cpu", context: int = 512, seed: int = 0,
    experts_in: QuantFormat = MXFP4,
) -> StepModel:  # fmt: skip
    """experts_in: the experts' format; sizes must be those of its tiles, or are made so on a CPU"""
    s = replace(sizes, fp8=fp8, tiles=EXPERT_TILES[experts_in.name])
    torch.manual_seed(seed)

    def normal(*shape: int, size: float) -> Tensor:
        return (torch.randn(shape, device=device) * size).to(torch.bfloat16)

    def dense(rows: int, columns: int) -> Tensor | QuantTensor:
        plain = normal(rows, columns, size=columns**-0.5)
        return encode(plain, FP8_ROW) if fp8 else plain

    def experts(rows: int, columns: int) -> QuantTensor:
        if experts_in is not MXFP4:
            sized = columns**-0.5 * torch.rand(s.experts, rows, columns // 32, 1, device=device)
            plain = torch.randn(s.experts, rows, columns // 32, 32, device=device) * (sized + 0.01)
            return encode(plain.flatten(-2), experts_in)
        values = torch.randint(
            0, 256, (s.experts, rows, columns // 2), device=device, dtype=torch.uint8
        )
        scales = torch.randint(
            120, 123, (s.experts, rows, columns // 32), device=device, dtype=torch.uint8
        )
        return QuantTensor(values, scales, MXFP4, (s.experts, rows, columns))

    layers = []
    for _ in range(s.layers):
        layers.append({
            "norm": normal(s.width, size=0.1) + 1,
            "qkv": dense(s.qkv_rows, s.width), "qkv_bias": normal(s.qkv_rows, size=0.1),
            "sinks": normal(s.heads, size=1),
            "out": dense(s.width, s.attention_width), "out_bias": normal(s.width, size=0.1),
            "moe_norm": normal(s.width, size=0.1) + 1,
            "router": normal(s.experts, s.width, size=s.width**-0.5),
            "router_bias": normal(s.experts, size=0.1),
            "gate_up": experts(2 * s.hidden, s.width),
            "gate_up_bias": normal(s.experts, 2 * s.hidden, size=0.1),
            "down": experts(s.width, s.hidden),
            "down_bias": normal(s.experts, s.width, size=0.1),
        })  # fmt: skip
    embedding, head = normal(s.vocabulary, s.width, size=1), dense(s.vocabulary, s.width)
    final_norm = normal(s.width, size=0.1) + 1
    slots = [min(context, 160) if i % 2 == 0 else context for i in range(s.layers)]
    sizes_of = [s.kv_heads * n * s.head_width for n in slots]
    cache = normal(2 * sum(sizes_of), size=1)
    table, at = [], 0
    for i, n in enumerate(sizes_of):
        table.append([at // 64, (at + n) // 64, slots[i], int(i % 2 == 0)])
        at += 2 * n
    half = s.head_width // 2
    angle = (
        torch.arange(context, device=device)[:, None]
        * 0.3 ** torch.arange(half, device=device)[None, :]
    )
    weights = step_weights(s, layers, embedding, head, final_norm)
    return StepModel(
        s, layers, embedding, head, final_norm, weights,
        StepBuffers.allocate(s, torch.device(device)), (angle.cos(), angle.sin()), cache,
        torch.tensor(table, device=device), slots,
    )  # fmt: skip


def step_weights(s, layers, embedding, head, final_norm) -> StepWeights:
    def stack(name: str) -> Tensor:
        return torch.stack([layer[name] for layer in layers])

    def values(weight):
        return weight.values if isinstance(weight, QuantTensor) else weight

    def scale(weights):
        if isinstance(weights[0], QuantTensor):
            return torch.cat([w.scales.view(-1) for w in weights])
        return torch.zeros(1, device=embedding.device)

    mixed = [
        mixed_projection(s, x["out"], x["out_bias"], x["router"], x["moe_norm"]) for x in layers
    ]
    tiles = []
    for layer, (rows, _, _) in zip(layers, mixed, strict=True):
        tiles += [pack_dense(values(layer["qkv"])), pack_dense(rows)]
    tiles.append(pack_dense(values(head), by_rows=True))

    def tiles_of_layer(layer) -> Tensor:
        halves = [pack_experts(layer[n], layer[f"{n}_bias"]) for n in ("gate_up", "down")]
        return torch.cat(halves, 1)

    return StepWeights(
        embedding, torch.cat(tiles), torch.cat([tiles_of_layer(x) for x in layers]).flatten(0, 1),
        stack("norm"), stack("moe_norm"), final_norm, scale([x["qkv"] for x in layers]),
        stack("qkv_bias"), stack("sinks"), torch.stack([m[1] for m in mixed]),
        torch.stack([m[2] for m in mixed]),
        torch.stack([pack_router(x["router"]) for x in layers]), stack("router_bias"),
        scale([head]),
    )  # fmt: skip


def plain(weight) -> Tensor:
    return decode(weight).float() if isinstance(weight, QuantTensor) else weight.float()


def expected_logits(
    model: StepModel, position: int, token: int = 17, *, keep: bool = False
) -> Tensor:
    """By plain torch in fp32, but for what the cache holds in bf16.

    keep: write the token's rows into the model's cache
    """
    s = model.sizes
    x = model.embedding[token].float()
    for i, w in enumerate(model.layers):
        normed = x * torch.rsqrt(x.square().mean() + s.eps) * w["norm"].float()
        qkv = plain(w["qkv"]) @ normed + w["qkv_bias"].float()
        at = int(model.table[i, 0]) * 64
        n = s.kv_heads * model.slots[i] * s.head_width
        k, v = (
            model.cache[at + j * n : at + (j + 1) * n].view(s.kv_heads, -1, s.head_width)
            for j in (0, 1)
        )
        if not keep:
            k, v = k.clone(), v.clone()
        x = (
            x
            + plain(w["out"]) @ _attend(s, qkv, model.rope, k, v, w["sinks"], position, i % 2 == 0)
            + w["out_bias"].float()
        )
        normed = x * torch.rsqrt(x.square().mean() + s.eps) * w["moe_norm"].float()
        best = (w["router"].float() @ normed + w["router_bias"].float()).topk(4)
        mixing = best.values.softmax(0)
        moe = 0
        for e, share in zip(best.indices.tolist(), mixing, strict=True):
            both = plain(w["gate_up"][e]) @ normed + w["gate_up_bias"][e].float()
            gate, up = both[0::2].clamp(max=s.limit), both[1::2].clamp(-s.limit, s.limit)
            h = gate * torch.sigmoid(s.alpha * gate) * (up + 1)
            moe = moe + share * (plain(w["down"][e]) @ h + w["down_bias"][e].float())
        x = x + moe
    normed = x * torch.rsqrt(x.square().mean() + s.eps) * model.final_norm.float()
    return plain(model.head) @ normed


def _attend(s, qkv, rope, k, v, sinks, position, sliding) -> Tensor:
    q, new_k, new_v = qkv.view(-1, s.head_width).split([s.heads, s.kv_heads, s.kv_heads])
    cos, sin = rope[0][position], rope[1][position]

    def turned(x):
        lo, hi = x.chunk(2, -1)
        return torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], -1).bfloat16()

    slots = k.shape[1]
    k[:, position % slots], v[:, position % slots] = turned(new_k), new_v.bfloat16()
    first = max(0, position - s.window + 1) if sliding else 0
    seen = torch.arange(first, position + 1, device=k.device) % slots
    k, v = k[:, seen].float(), v[:, seen].float()
    q = turned(q).float().view(s.kv_heads, -1, s.head_width)
    scores = q @ k.transpose(1, 2) * s.head_width**-0.5
    sink = sinks.float().view(s.kv_heads, -1, 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return (weights @ v).flatten()
