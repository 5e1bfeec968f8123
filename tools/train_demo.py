"""Train the small GPT-OSS demo checkpoint by the clock, write it as published, measure it.

    python3 tools/train_demo.py --train books.train.txt.xz --val books.val.txt \\
        --tokenizer books-bpe-4096.json --output demo --seconds 300

Phases: encode the text, compile and warm up, train for --seconds (rates, MXFP4 rounding and
sequence length all follow the elapsed share of that time), save the raw weights, write the
checkpoint, evaluate what was written. `--resume-raw FILE` repeats what follows training.
`--tiny` runs the whole pipeline on a CPU in about two minutes.
"""

import argparse
import collections
import math
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo_export
import numpy
import torch
from demo_card import model_card
from demo_data import TrainingWindows, encode_file, evaluation_windows
from demo_model import DemoConfig, DemoModel, balance_loss, fake_quantise, head_loss
from demo_optimizer import Muon, adamw, set_rate
from tokenizers import Tokenizer
from torch import Tensor, nn

REPORT_EVERY_S = 10.0
EVALUATE_EVERY_S = 60.0
# The host runs at most this many steps ahead of the GPU, so that its clock is the GPU's.
STEPS_AHEAD = 3
# Eager layers keep fp32 intermediates: this many parts of a batch at a time.
EAGER_PARTS = 16
PROMPTS = (
    "The old house stood at the end of the lane, and",
    '"My dear," said she, "I have never been so',
    "When the ship came into the harbour the captain",
)


@dataclass(frozen=True)
class Settings:
    """One training recipe. Shares are of the training time; rates are peaks."""

    config: DemoConfig
    length: int
    batch: int
    long_length: int
    long_batch: int
    warm_up_share: float = 0.02
    constant_share: float = 0.4
    quantised_share: float = 0.3
    long_share: float = 0.1
    muon_rate: float = 0.02
    embedding_rate: float = 0.03
    head_rate: float = 0.003
    vector_rate: float = 0.003
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    normaliser_loss: float = 1e-4
    balance_loss: float = 0.01
    # Above this after a tenth of the time something is broken, and the run stops.
    loss_at_a_tenth: float = 5.0
    seed: int = 1


FULL = Settings(
    DemoConfig(vocab_size=4096, hidden_size=256, intermediate_size=384, num_hidden_layers=6),
    length=1024, batch=64, long_length=4096, long_batch=16,
)  # fmt: skip
TINY = Settings(
    DemoConfig(vocab_size=4096, hidden_size=64, intermediate_size=64, num_hidden_layers=2),
    length=256, batch=4, long_length=512, long_batch=2, loss_at_a_tenth=20.0,
)  # fmt: skip


def main() -> None:
    """Run the phases."""
    arguments = parse_arguments()
    settings = TINY if arguments.tiny else FULL
    if not (arguments.tiny or arguments.resume_raw or torch.cuda.is_available()):
        raise SystemExit("error: the full training needs a CUDA device\nhint: --tiny runs on a CPU")
    clock = PhaseClock()
    if arguments.resume_raw:
        saved = torch.load(arguments.resume_raw, map_location="cpu", weights_only=True)
        training, config = saved["training"], DemoConfig(**saved["config"])
        validation = encode_file(
            arguments.val, arguments.tokenizer, max_characters=arguments.max_characters
        )
        device = pick_device()
        model = DemoModel(config).to(device)
        model.load_state_dict(saved["weights"])
    else:
        # Encoding forks processes, so it comes before the first CUDA call.
        text = encode_file(
            arguments.train, arguments.tokenizer, max_characters=arguments.max_characters
        )
        validation = encode_file(
            arguments.val, arguments.tokenizer, max_characters=arguments.max_characters
        )
        clock.end("encode", f"{len(text):,} training tokens, {len(validation):,} validation tokens")
        device = pick_device()
        model, training = train(settings, text, validation, device, arguments, clock)
        raw = arguments.raw or arguments.output.parent / "raw.pt"
        raw.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {"weights": model.state_dict(), "config": asdict(model.config), "training": training},
            raw,
        )
        clock.end("save raw weights", str(raw))
    finish(model, training, validation, device, arguments, clock)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, help="training text, plain or .xz")
    parser.add_argument("--val", type=Path, required=True, help="validation text")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="wall time of the training phase"
    )
    parser.add_argument(
        "--raw", type=Path, help="where the raw fp32 weights go (default: beside the output)"
    )
    parser.add_argument(
        "--resume-raw", type=Path, help="skip training: export and evaluate this file"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model, for a smoke run on a CPU"
    )
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--max-characters", type=int, help="read only this much of each text")
    arguments = parser.parse_args()
    if arguments.train is None and arguments.resume_raw is None:
        parser.error("give --train, or --resume-raw")
    return arguments


def pick_device() -> torch.device:
    """The GPU if there is one; fp32 products stay fp32 on it."""
    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class PhaseClock:
    """Prints and keeps the seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def end(self, phase: str, remark: str = "") -> None:
        """The phase that just ended."""
        now = time.monotonic()
        self.seconds[phase] = round(now - self._last, 2)
        self._last = now
        print(f"[{phase}] {self.seconds[phase]:.1f} s  {remark}", flush=True)


class Trainer:
    """Model, optimizers and compiled parts: one call of `step` is one optimizer step."""

    def __init__(self, settings: Settings, device: torch.device, *, compiled: bool):
        self.settings, self.device = settings, device
        torch.manual_seed(settings.seed)
        self.model = DemoModel(settings.config).to(device)
        self.parts = 1 if compiled or device.type == "cpu" else EAGER_PARTS
        self.head_loss = head_loss
        if compiled:
            # Layer by layer: two kinds of layer to compile instead of a graph of all of them.
            torch._dynamo.config.recompile_limit = 32
            for layer in self.model.layers:
                layer.compile(dynamic=False)
            self.head_loss = torch.compile(head_loss, dynamic=False)
        self.reset_optimizers()

    def reset_optimizers(self) -> None:
        """Fresh Muon and AdamW."""
        model, settings = self.model, self.settings
        # The router is a matrix, but its eight rows are better off with AdamW.
        matrices: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for layer in model.blocks:
            for name, parameter in layer.named_parameters():
                is_matrix = name in ("query", "key", "value", "output", "gate_up", "down")
                (matrices if is_matrix else vectors).append(parameter)
        self.muon = Muon(
            matrices, learning_rate=settings.muon_rate, weight_decay=settings.weight_decay
        )
        groups = [
            {"params": [model.embedding], "lr": settings.embedding_rate},
            {"params": [model.head], "lr": settings.head_rate},
            {"params": [*vectors, model.norm], "lr": settings.vector_rate},
        ]
        self.adamw = adamw(groups, self.device)

    def step(
        self, windows: TrainingWindows, scale: float, momentum: float, scale_rule: str | None
    ) -> Tensor:
        """One optimizer step; the cross-entropy before it, as a tensor nobody waits for."""
        settings, model = self.settings, self.model
        total = torch.zeros((), device=self.device)
        inputs, targets = windows.next()
        parts = min(self.parts, len(inputs))
        for ids, wanted in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            x, shares = model.hidden(ids, dtype=torch.bfloat16, scale_rule=scale_rule)
            losses = self.head_loss(x, model.norm, model.head, wanted, settings.config.rms_norm_eps)
            balance = balance_loss(shares, settings.config.num_experts_per_tok)
            loss = (
                losses[0] + settings.normaliser_loss * losses[1] + settings.balance_loss * balance
            )
            (loss / parts).backward()
            total += losses[0].detach() / parts
        nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        self.muon.step(scale, momentum)
        set_rate(self.adamw, scale)
        self.adamw.step()
        model.zero_grad(set_to_none=True)
        return total


def warmed_up_trainer(
    settings: Settings,
    short: TrainingWindows,
    long: TrainingWindows,
    device: torch.device,
    *,
    eager: bool,
) -> Trainer:
    """A trainer that has run every form of the step, back in its first state."""
    if not eager:
        try:
            return warm_up(Trainer(settings, device, compiled=True), short, long)
        except Exception:
            traceback.print_exc()
        print("WARNING: the compiled step failed; training eagerly, far slower", flush=True)
    return warm_up(Trainer(settings, device, compiled=False), short, long)


def warm_up(trainer: Trainer, short: TrainingWindows, long: TrainingWindows) -> Trainer:
    """Run both lengths and both forms of the experts, then put the first weights back."""
    first_state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for windows, scale_rule in ((short, None), (short, "even"), (long, "even"), (long, "even")):
        loss = trainer.step(windows, 0.01, 0.85, scale_rule).item()
        print(f"  warm-up: length {windows.length}, loss {loss:.3f}", flush=True)
        if not math.isfinite(loss):
            raise FloatingPointError("the loss of a warm-up step is not finite")
    trainer.model.load_state_dict(first_state)
    trainer.reset_optimizers()
    return trainer


def train(
    settings: Settings,
    text: numpy.ndarray,
    validation: numpy.ndarray,
    device: torch.device,
    arguments: argparse.Namespace,
    clock: PhaseClock,
) -> tuple[DemoModel, dict]:
    """Train for the given time; the model and the figures of the training."""
    tokens = torch.from_numpy(text).to(device)
    probe = evaluation_windows(torch.from_numpy(validation).to(device), settings.length)[:64]
    short = TrainingWindows(tokens, settings.length, settings.batch, settings.seed)
    long = TrainingWindows(tokens, settings.long_length, settings.long_batch, settings.seed + 1)
    trainer = warmed_up_trainer(settings, short, long, device, eager=arguments.eager)
    clock.end("compile and warm up", f"{peak_memory(device)} peak memory")

    ahead = StepsAhead(device)
    started = time.monotonic()
    next_report, next_evaluation = REPORT_EVERY_S, EVALUATE_EVERY_S
    steps, seen, scale_rule, rule_errors, curve = 0, 0, None, {}, []
    loss_sum, last_steps, last_seen, last_elapsed = torch.zeros((), device=device), 0, 0, 0.0
    while (elapsed := time.monotonic() - started) < arguments.seconds:
        share = elapsed / arguments.seconds
        if scale_rule is None and share >= 1 - settings.quantised_share:
            rule_errors = demo_export.scale_rule_errors(trainer.model)
            scale_rule = min(rule_errors, key=lambda rule: rule_errors[rule])
            print(f"  MXFP4 from here, rule {scale_rule}, errors {rule_errors}", flush=True)
        windows = long if share >= 1 - settings.long_share else short
        momentum = 0.85 + 0.1 * min(1.0, steps / 300)
        loss_sum += trainer.step(windows, rate_scale(settings, share), momentum, scale_rule)
        ahead.wait()
        steps, seen = steps + 1, seen + windows.batch * windows.length
        if elapsed >= next_report:
            loss = loss_sum.item() / (steps - last_steps)
            elapsed = time.monotonic() - started
            speed = (seen - last_seen) / (elapsed - last_elapsed)
            print(
                f"  {elapsed:6.1f} s  step {steps:6d}  loss {loss:.4f}  {speed / 1e3:.0f}k tok/s",
                flush=True,
            )
            if not loss < (settings.loss_at_a_tenth if share > 0.1 else 20.0):
                raise SystemExit(f"error: the loss is {loss}; training stopped")
            curve.append({"seconds": round(elapsed, 1), "step": steps, "loss": round(loss, 4)})
            last_steps, last_seen, last_elapsed = steps, seen, elapsed
            loss_sum.zero_()
            next_report += REPORT_EVERY_S
        if elapsed >= next_evaluation:
            curve[-1]["validation_loss"] = round(evaluate(plain_copy(trainer.model), probe)[0], 4)
            print(
                f"  validation loss (64 windows, fp32 experts) {curve[-1]['validation_loss']}",
                flush=True,
            )
            next_evaluation += EVALUATE_EVERY_S
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - started
    clock.end("train", f"{steps:,} steps, {seen:,} tokens, {peak_memory(device)} peak memory")
    figures = {
        "seed": settings.seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": str(torch.__version__),
        "seconds": round(seconds, 1),
        "steps": steps,
        "tokens": seen,
        "tokens_per_step": settings.batch * settings.length,
        "distinct_tokens": len(text),
        "passes": round(seen / len(text), 2),
        "scale_rule": scale_rule or "even",
        "scale_rule_errors_before_rounding": rule_errors,
        "compiled": trainer.parts == 1 and not arguments.eager,
        "phases_s": dict(clock.seconds),
        "curve": curve,
    }
    recipe = {name: value for name, value in asdict(settings).items() if name != "config"}
    return plain_copy(trainer.model), recipe | figures


def rate_scale(settings: Settings, share: float) -> float:
    """Linear warm-up, constant, linear to zero."""
    rising = share / settings.warm_up_share
    falling = (1 - share) / (1 - settings.constant_share)
    return max(0.0, min(1.0, rising, falling))


class StepsAhead:
    """Lets the host queue a few steps, not more."""

    def __init__(self, device: torch.device):
        self._queue: collections.deque | None = (
            collections.deque() if device.type == "cuda" else None
        )

    def wait(self) -> None:
        """Call after queueing a step: waits for the one STEPS_AHEAD before it."""
        if self._queue is None:
            return
        event = torch.cuda.Event()
        event.record()
        self._queue.append(event)
        if len(self._queue) > STEPS_AHEAD:
            self._queue.popleft().synchronize()


def plain_copy(model: DemoModel) -> DemoModel:
    """The same weights in a model that is not compiled, on the same device."""
    copy = DemoModel(model.config).to(model.embedding.device)
    copy.load_state_dict(model.state_dict())
    return copy


def finish(
    model: DemoModel,
    training: dict,
    validation: numpy.ndarray,
    device: torch.device,
    arguments: argparse.Namespace,
    clock: PhaseClock,
) -> None:
    """Write the checkpoint, evaluate the raw weights and the written file, describe, sample."""
    folder, config = arguments.output, model.config
    demo_export.write_checkpoint(folder, model, arguments.tokenizer, training["scale_rule"])
    clock.end("write checkpoint", f"rule {training['scale_rule']}")
    published = demo_export.read_checkpoint(folder, config).to(device)
    check_fake_quantised(model, published, training["scale_rule"])
    tokens = torch.from_numpy(validation).to(device)
    raw = demo_export.with_rounded_dense(model).to(device)
    raw_figures, _ = perplexities(raw, tokens, training)
    file_figures, shares = perplexities(published, tokens, training)
    clock.end("evaluate")
    errors = demo_export.scale_rule_errors(model)
    samples = [
        continuation(published, arguments.tokenizer, prompt, seed=i)
        for i, prompt in enumerate(PROMPTS)
    ]
    clock.end("sample")
    report = {
        "parameters": model.num_parameters(),
        "active_parameters": model.num_active_parameters(),
        "config": asdict(config),
        "training": training,
        "scale_rule_errors": errors,
        "validation": {"file": arguments.val.name, "tokens": len(validation)},
        "perplexity": {"fp32_experts": raw_figures, "mxfp4_experts": file_figures},
        "expert_share_of_choices": shares,
        "samples": samples,
    }
    demo_export.write_json(folder / "training_report.json", report)
    (folder / "README.md").write_text(model_card(config, report))
    for sample in samples:
        print(f"---\n{sample}", flush=True)
    print("---")
    print(f"perplexity, fp32 experts:  {raw_figures}")
    print(f"perplexity, MXFP4 experts: {file_figures}")
    print(f"scale rule errors {errors}")
    sizes = demo_export.folder_bytes(folder)
    print(
        f"{sizes}\n{sum(sizes.values()):,} bytes in all, {model.num_parameters():,} parameters",
        flush=True,
    )
    assert sum(sizes.values()) <= demo_export.MAX_FOLDER_BYTES, "the folder is too large"


def check_fake_quantised(model: DemoModel, published: DemoModel, scale_rule: str) -> None:
    """The experts of the written file are the ones that the last part of the training used."""
    for layer, written in zip(model.blocks, published.blocks, strict=True):
        for ours, theirs in ((layer.gate_up, written.gate_up), (layer.down, written.down)):
            if not torch.equal(fake_quantise(ours.detach(), scale_rule), theirs):
                print(
                    "WARNING: written experts differ from the rounding used in training", flush=True
                )
                return
    print("  the written experts are those of the rounded forward pass, bit for bit", flush=True)


def perplexities(
    model: DemoModel, tokens: Tensor, training: dict
) -> tuple[dict[str, float], list[list[float]]]:
    """Perplexity by kind of window, and share_LE of each expert in the choices."""
    length, long_length = training["length"], training["long_length"]
    windows = evaluation_windows(tokens, length)
    loss, losses, shares = evaluate(model, windows)
    figures = {f"all_{length}": loss, f"first_64_of_{length}": losses[:64].mean().item()}
    long_windows = evaluation_windows(tokens, long_length)
    figures[f"all_{long_length}"] = evaluate(model, long_windows)[0]
    return {name: round(float(numpy.exp(value)), 4) for name, value in figures.items()}, shares


@torch.no_grad()
def evaluate(model: DemoModel, windows: Tensor) -> tuple[float, Tensor, list[list[float]]]:
    """Mean loss, the loss of each window, and share_LE of each expert in the choices; fp32.

    The first token of a window is not scored.
    """
    tokens_at_once = 16384 if windows.is_cuda else 2048
    losses, shares = [], []
    for batch in windows.split(max(1, tokens_at_once // windows.shape[1])):
        ids = batch.long()
        x_BSD, share_L2E = model.hidden(ids)
        logits = model.head_logits(x_BSD)[:, :-1]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        losses.append(loss.double().mean(1))
        shares.append(share_L2E[:, 0] * len(ids))
    share_LE = torch.stack(shares).sum(0) / len(windows) / model.config.num_experts_per_tok
    each = torch.cat(losses)
    return each.mean().item(), each, [[round(v, 4) for v in row] for row in share_LE.tolist()]


@torch.no_grad()
def continuation(
    model: DemoModel, tokenizer_path: Path, prompt: str, *, seed: int, count: int = 120
) -> str:
    """The prompt and `count` tokens sampled at temperature 0.8, without a cache."""
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt).ids
    for _ in range(count):
        # Later positions change nothing; the sliding layers want whole windows.
        padded = ids + [0] * (-len(ids) % model.config.sliding_window)
        x_BSD, _ = model.hidden(torch.tensor([padded], device=model.embedding.device))
        probabilities = (model.head_logits(x_BSD[0, len(ids) - 1]) / 0.8).softmax(-1).cpu()
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        if ids[-1] == 0:
            break
    return tokenizer.decode(ids)


def peak_memory(device: torch.device) -> str:
    """Largest GPU memory so far."""
    return (
        f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if device.type == "cuda" else "no GPU"
    )


if __name__ == "__main__":
    main()
