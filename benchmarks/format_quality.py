"""What each format and scale rule costs: signal to noise of weights, perplexity of the demo model.

    python benchmarks/format_quality.py --text TEXT --csv benchmarks/results/cpu_2core.csv

Columns: SQNR of normal weights and of weights with heavy tails (Student's t with 4 degrees of
freedom), both drawn as bf16; then the demo with its experts converted by `convert`: SQNR,
perplexity, KL to the source and top-1 agreement with it; last the encoder's speed on this machine.

The demo ships with MXFP4 experts and was trained for them, so converting it as it is would favour
MXFP4. Here its residual stream is first turned by a random orthogonal matrix, with the norms'
weights folded in: the same model in exact arithmetic, with all matrices off the grid that they were
trained on, stored as bf16. That bf16 model is the source of all conversions.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_runtime import MoeModel
from moe_runtime.conversion.convert import convert
from moe_runtime.conversion.options import ConversionOptions
from moe_runtime.evaluation import Evaluation, evaluate
from quant.codecs import encode
from quant.formats import FP8_BLOCK128_E8M0, TARGETS, QuantFormat
from quant.quality import measure

COLUMNS = ("date", "commit", "gpu", "runtime", "model", "formats", "context", "metric", "value",
           "unit")  # fmt: skip
SPEED_SHAPE = (4096, 4096)


@dataclass(frozen=True)
class Variant:
    """One way to encode, as `convert` is asked for it."""

    label: str
    target: str
    scale_rule: str | None = None
    scale_search: str = "none"
    power_of_two_scales: bool = False

    @property
    def format(self) -> QuantFormat:
        """The descriptor."""
        return FP8_BLOCK128_E8M0 if self.power_of_two_scales else TARGETS[self.target]

    @property
    def conversion(self) -> ConversionOptions:
        """For `convert`."""
        return ConversionOptions(
            self.target,
            scale_rule=self.scale_rule,
            scale_search=self.scale_search,
            power_of_two_scales=self.power_of_two_scales,
        )

    @property
    def encoding(self) -> dict[str, Any]:
        """For `encode`."""
        rule: dict[str, Any] = {"scale_rule": self.scale_rule} if self.scale_rule else {}
        return rule | ({"scale_search": "mse"} if self.scale_search == "mse" else {})

    @property
    def bits(self) -> float:
        """Bits of a weight with its share of the scales, in a large matrix."""
        if self.format.block is None or self.format.scale_dtype is None:
            return self.format.value_bits
        height, width = self.format.block
        scale_bits = 8 * torch.empty((), dtype=self.format.scale_dtype).element_size()
        return self.format.value_bits + (scale_bits / (height * width) if width else 0.0)


VARIANTS = (
    Variant("MXFP4, floor", "mxfp4", "floor"),
    Variant("MXFP4, even", "mxfp4", "even"),
    Variant("MXFP4, rceil", "mxfp4", "rceil"),
    Variant("MXFP4, even, search", "mxfp4", "even", "mse"),
    Variant("NVFP4", "nvfp4"),
    Variant("NVFP4, search", "nvfp4", scale_search="mse"),
    Variant("MXFP8, even", "mxfp8", "even"),
    Variant("FP8 128x128", "fp8-block"),
    Variant("FP8 128x128, powers of two", "fp8-block", power_of_two_scales=True),
    Variant("FP8 by row", "fp8-channel"),
)


class Recorded:
    """A model that remembers its logits: every variant is compared with the same ones."""

    def __init__(self, model: MoeModel) -> None:
        self.model = model
        self.max_context = model.max_context
        self.known: dict[tuple[int, ...], Tensor] = {}

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """As MoeModel.logits."""
        key = tuple(token_ids)
        if key not in self.known:
            self.known[key] = self.model.logits(token_ids)
        return self.known[key]


def main() -> None:
    arguments = parse_arguments()
    text = arguments.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source = Path(folder) / "source"
        convert("demo", source, ConversionOptions("bf16"), progress=False)
        turn_residual_stream(source / "model-00001-of-00001.safetensors")
        rows = list(bench(source, Path(folder), text, arguments.tokens))
    if arguments.csv:
        append(arguments.csv, rows)


def bench(source: Path, folder: Path, text: str, tokens: int) -> Iterator[dict[str, object]]:
    """Print the table; rows of the CSV."""
    print("| format | bits | normal, dB | heavy tails, dB | demo's experts, dB | perplexity | "
          "KL | top-1 | encode, MB/s |")  # fmt: skip
    print("| --- " * 9 + "|")
    with open_model(source) as model:
        ids = model.tokenizer.encode(text)[:tokens]
        reference = Recorded(model)
        plain = evaluate(reference, ids)
        print(f"| source, bf16 | 16 | - | - | - | {plain.perplexity:.3f} | 0 | 100 % | - |")
        yield row("bf16", len(ids), "perplexity", f"{plain.perplexity:.5f}", "")
        for variant in VARIANTS:
            report = convert(str(source), folder / "out", variant.conversion, progress=False,
                             overwrite=True)  # fmt: skip
            with open_model(folder / "out") as converted:
                found = evaluate(converted, ids, against=reference)
            experts = report["totals"]["quality"]["sqnr_db"]
            normal, heavy = (sqnr(variant, weight) for weight in (normal_weight(), heavy_weight()))
            rate = encode_rate(variant)
            print(f"| {variant.label} | {variant.bits:.4g} | {normal:.2f} | {heavy:.2f} | "
                  f"{experts:.2f} | {found.perplexity:.3f} | {found.kl:.4f} | "
                  f"{100 * (found.top1_agreement or 0):.1f} % | {rate:.0f} |",
                  flush=True)  # fmt: skip
            yield from rows_of(variant, found, experts, normal, heavy, rate)


def open_model(folder: Path) -> MoeModel:
    return MoeModel.from_pretrained(folder, device="cpu", max_context=1024, progress=False)


def turn_residual_stream(file: Path) -> None:
    """Rewrite bf16 GPT-OSS weights so that x becomes x Q everywhere, the norms' weights folded in.

    An RMS norm without weights commutes with an orthogonal Q, so matrices that read the stream get
    Q on their input, and those that write it on their output.
    """
    tensors = {name: tensor.double() for name, tensor in load_file(file).items()}
    width = tensors["model.norm.weight"].numel()
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    tensors["model.embed_tokens.weight"] @= q
    readers = [("model.norm.weight", ["lm_head.weight"])]
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    for layer in layers:
        prefix = f"model.layers.{layer}."
        projections = [f"{prefix}self_attn.{name}_proj.weight" for name in "qkv"]
        readers.append((prefix + "input_layernorm.weight", projections))
        moe = [prefix + "mlp.router.weight", prefix + "mlp.experts.gate_up_proj"]
        readers.append((prefix + "post_attention_layernorm.weight", moe))
        output = prefix + "self_attn.o_proj."
        tensors[output + "weight"] = q.mT @ tensors[output + "weight"]
        for name in (output + "bias", prefix + "mlp.experts.down_proj_bias",
                     prefix + "mlp.experts.down_proj"):  # fmt: skip
            tensors[name] = tensors[name] @ q
    for norm, matrices in readers:
        for name in matrices:
            if name.endswith("gate_up_proj"):  # stored [experts, input, output]
                tensors[name] = q.mT @ (tensors[norm][:, None] * tensors[name])
            else:
                tensors[name] = (tensors[name] * tensors[norm]) @ q
        tensors[norm] = torch.ones_like(tensors[norm])
    rounded = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
    save_file(rounded, file, metadata={"format": "pt"})


def normal_weight() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2048, 2048, generator=generator) * 0.02).bfloat16()


def heavy_weight() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    size = (2048, 2048)
    squares = torch.randn(4, *size, generator=generator).square().sum(0)
    return (0.02 * torch.randn(size, generator=generator) / (squares / 4).sqrt()).bfloat16()


def sqnr(variant: Variant, weight: Tensor) -> float:
    found = measure(weight, encode(weight, variant.format, **variant.encoding)).sqnr_db
    assert found is not None
    return found


def encode_rate(variant: Variant, repeats: int = 5) -> float:
    """MB of bf16 weights a second, the best of some."""
    weight = torch.randn(SPEED_SHAPE, generator=torch.Generator().manual_seed(3)).bfloat16()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        encode(weight, variant.format, **variant.encoding)
        seconds.append(time.perf_counter() - start)
    return weight.nbytes / 1e6 / min(seconds)


def rows_of(
    variant: Variant, found: Evaluation, experts: float, normal: float, heavy: float, rate: float
) -> Iterator[dict[str, object]]:
    """The lines of the CSV of one variant."""
    assert found.kl is not None and found.top1_agreement is not None
    for metric, value, unit in (
        ("sqnr_normal", f"{normal:.3f}", "dB"),
        ("sqnr_heavy_tails", f"{heavy:.3f}", "dB"),
        ("sqnr_experts", f"{experts:.3f}", "dB"),
        ("perplexity", f"{found.perplexity:.5f}", ""),
        ("kl", f"{found.kl:.6f}", "nats"),
        ("top1_agreement", f"{found.top1_agreement:.5f}", ""),
        ("encode_mb_per_s", f"{rate:.1f}", "MB/s"),
    ):
        yield row(variant.label.replace(", ", " "), found.tokens, metric, value, unit)


def row(label: str, tokens: int, metric: str, value: str, unit: str) -> dict[str, object]:
    """One line of the CSV."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    values = (
        *(datetime.date.today().isoformat(), commit, f"none, {os.cpu_count()} CPU cores"),
        *(f"torch {torch.__version__}", "demo, residual stream turned, bf16"),
        *(f"experts={label}", tokens, metric, value, unit),
    )
    return dict(zip(COLUMNS, values, strict=True))


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Add rows to a CSV, with the header if it is new."""
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to score")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text")
    parser.add_argument("--folder", type=Path, help="for the checkpoints; default a temporary one")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
