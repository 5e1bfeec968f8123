"""GPT-OSS in a form that trains fast: every expert computes every token, weights do the routing.

With 4 of 8 experts chosen, computing all eight costs twice the arithmetic and no gather, and the
expert sum becomes one matrix product: h_T(EF) @ down_(EF)D with h already multiplied by the routing
weights. The maths is the published one, term by term.

Shape letters: B sequences, S positions, T = B * S tokens, D hidden, V vocabulary, H query heads,
K key/value heads, G = H / K, h head size, E experts, F expert inner size, N windows, W window size.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant import mxfp4
from quant.e8m0 import decode_e8m0

SWIGLU_ALPHA = 1.702


@dataclass(frozen=True)
class DemoConfig:
    """Sizes and constants of one demo model; the names are those of the published config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_local_experts: int = 8
    num_experts_per_tok: int = 4
    sliding_window: int = 128
    swiglu_limit: float = 7.0
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    yarn_factor: float = 4.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    initial_context_length: int = 1024

    @property
    def max_position_embeddings(self) -> int:
        """Positions that the YaRN table is made for."""
        return int(self.initial_context_length * self.yarn_factor)


class Layer(nn.Module):
    """One block. Expert weights arrive as arguments, in the dtype that the matrix products use."""

    def __init__(self, config: DemoConfig, sliding: bool):
        super().__init__()
        self.config, self.sliding = config, sliding
        D, h = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        E, inner = config.num_local_experts, config.intermediate_size
        self.input_norm = nn.Parameter(torch.ones(D))
        self.query = _matrix(H * h, D)
        self.key = _matrix(K * h, D)
        self.value = _matrix(K * h, D)
        self.output = nn.Parameter(torch.zeros(D, H * h))
        self.query_bias = nn.Parameter(torch.zeros(H * h))
        self.key_bias = nn.Parameter(torch.zeros(K * h))
        self.value_bias = nn.Parameter(torch.zeros(K * h))
        self.output_bias = nn.Parameter(torch.zeros(D))
        self.sinks = nn.Parameter(torch.zeros(H))
        self.post_norm = nn.Parameter(torch.ones(D))
        self.router = nn.Parameter(torch.randn(E, D) * 0.02)
        self.router_bias = nn.Parameter(torch.zeros(E))
        # The gate and up rows apart: contiguous halves here, interleaved in the published file.
        self.gate_up = _matrix(2, E, inner, D)
        self.gate_up_bias = nn.Parameter(torch.zeros(2, E, inner))
        self.down = nn.Parameter(torch.zeros(E, D, inner))
        self.down_bias = nn.Parameter(torch.zeros(E, D))

    def forward(
        self, x_BSD: Tensor, gate_up_2EFD: Tensor, down_EDF: Tensor, cos_Sh: Tensor, sin_Sh: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x_BSD fp32 -> (x_BSD fp32, share_2E: fraction of choices and mean probability)."""
        x_BSD = x_BSD + self._attention(x_BSD, cos_Sh, sin_Sh, gate_up_2EFD.dtype)
        moe_BSD, share_2E = self._experts(x_BSD, gate_up_2EFD, down_EDF)
        return x_BSD + moe_BSD, share_2E

    def _attention(
        self, x_BSD: Tensor, cos_Sh: Tensor, sin_Sh: Tensor, dtype: torch.dtype
    ) -> Tensor:
        config = self.config
        B, S, _ = x_BSD.shape
        H, K, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        normed = rms_norm(x_BSD, self.input_norm, config.rms_norm_eps).to(dtype)
        weight = torch.cat((self.query, self.key, self.value)).to(dtype)
        bias = torch.cat((self.query_bias, self.key_bias, self.value_bias)).to(dtype)
        heads = F.linear(normed, weight, bias).view(B, S, H + 2 * K, h).transpose(1, 2)
        # 1 / sqrt(64) is a power of two: the scaled query is exact in bf16.
        query = (rope(heads[:, :H], cos_Sh, sin_Sh) * h**-0.5).to(dtype)
        key = rope(heads[:, H : H + K], cos_Sh, sin_Sh).to(dtype)
        value = heads[:, H + K :]
        query = query.reshape(B, K, H // K, S, h)
        sinks = self.sinks.view(1, K, H // K, 1)
        if self.sliding:
            mixed = sliding_attention(query, key, value, sinks, config.sliding_window)
        else:
            mixed = full_attention(query, key, value, sinks)
        mixed = mixed.reshape(B, H, S, h).transpose(1, 2).reshape(B, S, H * h)
        return F.linear(mixed, self.output.to(dtype), self.output_bias.to(dtype)).float()

    def _experts(
        self, x_BSD: Tensor, gate_up_2EFD: Tensor, down_EDF: Tensor
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        dtype = gate_up_2EFD.dtype
        E, inner = config.num_local_experts, config.intermediate_size
        normed_TD = rms_norm(x_BSD, self.post_norm, config.rms_norm_eps).flatten(0, 1)
        # The router stays in fp32 on the rounded activations: a flipped choice is a large error.
        logits_TE = F.linear(normed_TD.to(dtype).float(), self.router, self.router_bias)
        chosen_TE = largest(logits_TE, config.num_experts_per_tok)
        weight_TE = logits_TE.masked_fill(~chosen_TE, -math.inf).softmax(-1)

        both = F.linear(normed_TD.to(dtype), gate_up_2EFD.reshape(2 * E * inner, -1))
        both = both.view(-1, 2, E, inner).float() + self.gate_up_bias
        gate = both[:, 0].clamp(max=config.swiglu_limit)
        up = both[:, 1].clamp(-config.swiglu_limit, config.swiglu_limit)
        hidden = gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1) * weight_TE[..., None]
        down_DC = down_EDF.transpose(0, 1).reshape(-1, E * inner)
        moe = F.linear(hidden.to(dtype).flatten(1), down_DC).float() + weight_TE @ self.down_bias
        share_2E = torch.stack((chosen_TE.float().mean(0), logits_TE.softmax(-1).mean(0)))
        return moe.view_as(x_BSD), share_2E


class DemoModel(nn.Module):
    """Embedding, layers, last norm and head; parameters in fp32, named as in Layer."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DemoConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(
            Layer(config, i % 2 == 0) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.head = nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size))
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def hidden(
        self, ids_BS: Tensor, *, dtype: torch.dtype = torch.float32, scale_rule: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Residual stream after the last layer, fp32, and share_L2E.

        dtype: of the matrix products. scale_rule: fake-quantise the experts to MXFP4 by this rule.
        """
        S = ids_BS.shape[1]
        x_BSD = F.embedding(ids_BS, self.embedding)
        shares = []
        for layer in self.blocks:
            gate_up = ExpertWeight.apply(layer.gate_up, dtype, scale_rule)
            down = ExpertWeight.apply(layer.down, dtype, scale_rule)
            x_BSD, share_2E = layer(x_BSD, gate_up, down, self.cos[:S], self.sin[:S])
            shares.append(share_2E)
        return x_BSD, torch.stack(shares)

    @property
    def blocks(self) -> list[Layer]:
        """The layers, with their type."""
        return [cast(Layer, layer) for layer in self.layers]

    def head_logits(self, x: Tensor) -> Tensor:
        """fp32 logits [..., V] of the residual stream [..., D], in fp32 arithmetic."""
        return F.linear(rms_norm(x, self.norm, self.config.rms_norm_eps), self.head)

    def num_parameters(self) -> int:
        """All parameters."""
        return sum(p.numel() for p in self.parameters())

    def num_active_parameters(self) -> int:
        """Parameters that one token uses: the chosen experts, one row of the embedding."""
        config = self.config
        idle_share = 1 - config.num_experts_per_tok / config.num_local_experts
        experts = sum(
            p.numel()
            for layer in self.blocks
            for p in (layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias)
        )
        idle = int(experts * idle_share) + (config.vocab_size - 1) * config.hidden_size
        return self.num_parameters() - idle


class ExpertWeight(torch.autograd.Function):
    """fp32 weight -> compute dtype, through MXFP4 if a rule is given; gradients pass straight."""

    @staticmethod
    def forward(ctx, weight: Tensor, dtype: torch.dtype, scale_rule: str | None) -> Tensor:
        # An MXFP4 value is exact in bf16, so the order of the two steps does not matter.
        return (weight if scale_rule is None else fake_quantise(weight, scale_rule)).to(dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.float(), None, None


def fake_quantise(weight: Tensor, scale_rule: str) -> Tensor:
    """decode(encode(weight)) without leaving the GPU: the same scales, elements rounded to even."""
    groups = weight.unflatten(-1, (-1, mxfp4.GROUP))
    scale = decode_e8m0(mxfp4.scale_bytes_for(groups.abs().amax(-1), scale_rule))[..., None]
    scaled = (groups / scale).clamp(-6, 6)
    # E2M1 steps: 0.5 below 2, 1 from 2 to 4, 2 from 4 to 6.
    size = scaled.abs()
    step = 0.5 + 0.5 * (size >= 2) + 1.0 * (size >= 4)
    return (torch.round(scaled / step) * step * scale).flatten(-2)


def head_loss(
    x_BSD: Tensor, norm_D: Tensor, head_VD: Tensor, targets_BS: Tensor, eps: float
) -> Tensor:
    """[mean cross-entropy, mean square of the log normaliser]: bf16 logits, fp32 reductions."""
    normed = rms_norm(x_BSD, norm_D, eps).to(torch.bfloat16).flatten(0, 1)
    logits_TV = F.linear(normed, head_VD.to(torch.bfloat16)).float()
    cross_entropy = F.cross_entropy(logits_TV, targets_BS.flatten())
    return torch.stack((cross_entropy, logits_TV.logsumexp(-1).square().mean()))


def balance_loss(share_L2E: Tensor, top_k: int) -> Tensor:
    """Switch-style loss, 1 when choices and probabilities are even; mean over the layers."""
    num_experts = share_L2E.shape[-1]
    return (share_L2E[:, 0] / top_k * share_L2E[:, 1]).sum(-1).mean() * num_experts


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """fp32 norm with the weight multiplied in fp32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope(x: Tensor, cos_Sh: Tensor, sin_Sh: Tensor) -> Tensor:
    """Rotate the pairs (i, i + h/2) of [..., S, h]; fp32 out."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos_Sh - second * sin_Sh, second * cos_Sh + first * sin_Sh), dim=-1)


def rope_tables(config: DemoConfig) -> tuple[Tensor, Tensor]:
    """YaRN cos and sin, fp32 [max positions, h/2], both carrying 0.1 ln(factor) + 1."""
    half = config.head_dim // 2
    theta, context = config.rope_theta, config.initial_context_length

    def edge(beta: float) -> float:
        return half * math.log(context / (2 * math.pi * beta)) / math.log(theta)

    low, high = edge(config.yarn_beta_fast), edge(config.yarn_beta_slow)
    index = torch.arange(half, dtype=torch.float64)
    base = theta ** (-index / half)
    ramp = ((index - low) / (high - low)).clamp(0, 1)
    frequency = base * (1 - ramp) + base / config.yarn_factor * ramp
    angle = torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None] * frequency
    concentration = 0.1 * math.log(config.yarn_factor) + 1
    return (angle.cos() * concentration).float(), (angle.sin() * concentration).float()


def full_attention(
    query_BKGSh: Tensor, key_BKSh: Tensor, value_BKSh: Tensor, sinks: Tensor
) -> Tensor:
    """Causal attention over all earlier positions -> [B, K, G, S, h]."""
    B, K, G, S, h = query_BKGSh.shape
    position = torch.arange(S, device=query_BKGSh.device)
    allowed_SS = position[:, None] >= position
    scores = query_BKGSh.reshape(B, K, G * S, h) @ key_BKSh.transpose(-1, -2)
    weight = sink_softmax(scores.view(B, K, G, S, S), allowed_SS, sinks[..., None])
    mixed = weight.to(value_BKSh.dtype).view(B, K, G * S, S) @ value_BKSh
    return mixed.view(B, K, G, S, h)


def sliding_attention(
    query_BKGSh: Tensor, key_BKSh: Tensor, value_BKSh: Tensor, sinks: Tensor, window: int
) -> Tensor:
    """The query and the window - 1 positions before it: blocks of queries against two of keys."""
    B, K, G, S, h = query_BKGSh.shape
    W, N = window, S // window
    assert S % W == 0, (S, W)
    row = torch.arange(W, device=query_BKGSh.device)[:, None] + W
    column = torch.arange(2 * W, device=query_BKGSh.device)
    allowed = (column <= row) & (column > row - W)
    # The first block has no block before it.
    first = torch.arange(N, device=query_BKGSh.device)[:, None, None] > 0
    allowed_NWC = allowed & (first | (column >= W))
    query = query_BKGSh.view(B, K, G, N, W, h).transpose(2, 3).reshape(B, K, N, G * W, h)
    scores = query @ _with_block_before(key_BKSh, W).transpose(-1, -2)
    scores = scores.view(B, K, N, G, W, 2 * W)
    weight = sink_softmax(scores, allowed_NWC[:, None], sinks.view(1, K, 1, G, 1, 1))
    weight = weight.to(value_BKSh.dtype).view(B, K, N, G * W, 2 * W)
    mixed = weight @ _with_block_before(value_BKSh, W)
    return mixed.view(B, K, N, G, W, h).transpose(2, 3).reshape(B, K, G, S, h)


def _with_block_before(x_BKSh: Tensor, window: int) -> Tensor:
    """[B, K, S, h] -> [B, K, S / W, 2 W, h]: each block of positions after the one before it."""
    blocks = x_BKSh.unflatten(2, (-1, window))
    before = torch.cat((torch.zeros_like(blocks[:, :, :1]), blocks[:, :, :-1]), dim=2)
    return torch.cat((before, blocks), dim=3)


def sink_softmax(scores: Tensor, allowed: Tensor, sink: Tensor) -> Tensor:
    """Softmax in fp32 whose denominator also holds exp(sink); no weight goes to the sink."""
    scores = scores.float().masked_fill(~allowed, -math.inf)
    peak = torch.maximum(scores.amax(-1, keepdim=True), sink).detach()
    exponential = torch.exp(scores - peak)
    return exponential / (exponential.sum(-1, keepdim=True) + torch.exp(sink - peak))


def largest(logits_TE: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest of each row, ties to the lower index; no sort, so it fuses."""
    index = torch.arange(logits_TE.shape[-1], device=logits_TE.device)
    other, own = logits_TE[:, None, :], logits_TE[:, :, None]
    ahead = (other > own) | ((other == own) & (index < index[:, None]))
    return ahead.sum(-1) < count


def _matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * shape[-1] ** -0.5)
