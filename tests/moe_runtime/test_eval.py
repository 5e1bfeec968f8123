"""`eval`: every token scored once, figures that can be worked out by hand, and the verb."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime import MoeModel, cli
from moe_runtime.conversion.convert import convert
from moe_runtime.conversion.options import ConversionOptions
from moe_runtime.evaluation import evaluate, windows

TEXT = Path(__file__).parents[1] / "vectors" / "books.val.head.txt"


class Table:
    """A model whose next token depends on the last one alone: row of logits by token."""

    def __init__(self, logits: torch.Tensor, max_context: int = 64) -> None:
        self.table = logits
        self.max_context = max_context
        self.read: list[list[int]] = []

    def logits(self, token_ids):
        self.read.append(list(token_ids))
        return self.table[list(token_ids)]


def random_table(seed: int, vocab: int = 11, **more) -> Table:
    generator = torch.Generator().manual_seed(seed)
    return Table(torch.randn(vocab, vocab, generator=generator) * 2, **more)


IDS = torch.randint(0, 11, (300,), generator=torch.Generator().manual_seed(9)).tolist()


@given(st.integers(2, 200), st.integers(2, 60))
def test_every_token_is_scored_once_with_half_a_window_before_it(num_tokens, size):
    scored = []
    for start, first in windows(num_tokens, size):
        stop = min(start + size, num_tokens)
        scored += range(start + first, stop)
        assert start == 0 or first >= size // 2
        assert 1 <= first < stop - start
    assert scored == list(range(1, num_tokens))


@pytest.mark.parametrize("window", [None, 17])
def test_figures_by_hand(window):
    ours, theirs = random_table(0), random_table(1)
    found = evaluate(ours, IDS, against=theirs, window=window)
    p = ours.table.double().softmax(1)[IDS[:-1]]
    q = theirs.table.double().softmax(1)[IDS[:-1]]
    at = torch.tensor(IDS[1:])[:, None]
    kl = (q * (q / p).log()).sum(1)
    assert found.tokens == 299
    assert found.perplexity == pytest.approx(math.exp(-p.gather(1, at).log().mean()), rel=1e-9)
    expected = math.exp(-q.gather(1, at).log().mean())
    assert found.reference_perplexity == pytest.approx(expected, rel=1e-9)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-9)
    assert found.largest_kl == pytest.approx(float(kl.max()), rel=1e-9)
    assert found.top1_agreement == float((p.argmax(1) == q.argmax(1)).double().mean())
    assert found.accuracy == float((p.argmax(1) == at[:, 0]).double().mean())
    assert all(len(read) <= (window or 64) for read in ours.read)
    assert ours.read == theirs.read


def test_a_model_beside_itself():
    found = evaluate(random_table(0), IDS, against=random_table(0))
    assert found.kl == 0 and found.top1_agreement == 1
    assert found.perplexity == found.reference_perplexity
    alone = evaluate(random_table(0), IDS)
    assert alone.perplexity == found.perplexity and alone.kl is None


def test_tokens_without_probability_lose_nothing():
    ours, theirs = random_table(0), random_table(1)
    theirs.table[:, 3] = -torch.inf
    found = evaluate(ours, [i for i in IDS if i != 3], against=theirs)
    assert 0 < found.kl < 10 and math.isfinite(found.largest_kl)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="the text has 1 tokens: at least 2"):
        evaluate(random_table(0), [4])
    with pytest.raises(ValueError, match="window must be from 2 to 32 tokens, got 33"):
        evaluate(random_table(0), IDS, against=random_table(1, max_context=32), window=33)
    with pytest.raises(ValueError, match="the vocabularies differ: 11 and 12 tokens"):
        evaluate(random_table(0), IDS, against=random_table(1, vocab=12))


def test_perplexity_is_that_of_the_model():
    with MoeModel.from_pretrained("demo", device="cpu", max_context=64, progress=False) as model:
        ids = model.tokenizer.encode(TEXT.read_text())[:150]
        found = evaluate(model, ids)
        assert found.perplexity == pytest.approx(model.perplexity(ids, window=64), rel=1e-5)
        assert 5 < found.perplexity < 60 and found.accuracy > 0.25


def test_figures_go_into_the_report_of_a_conversion(capsys, tmp_path):
    output, text = tmp_path / "plain", tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:300])
    convert("demo", output, ConversionOptions("bf16"), progress=False)
    before = json.loads((output / "conversion_report.json").read_text())
    options = ["--text", str(text), "--max-tokens", "40", "--device", "cpu", "--add-to-report"]
    assert cli.run(["eval", str(output), "--against", "demo", *options]) == 0
    saved = json.loads((output / "conversion_report.json").read_text())
    found = saved["meta"].pop("evaluation")
    assert found["tokens"] == 39 and 0 <= found["kl"] < 1e-9 and found["top1_agreement"] == 1
    assert saved == before
    page = (output / "conversion_report.html").read_text()
    assert f"perplexity {found['perplexity']:.6g}" in page and "top1 agreement 1" in page
    card = (output / "README.md").read_text()
    assert cli.run(["eval", str(output), *options]) == 0
    again = (output / "README.md").read_text()
    start, _, section = card.partition("## Evaluation\n")
    assert "- KL from it" in section and "- the same best token 100.00 %" in section
    assert again.partition("## Evaluation\n")[0] == start and "| experts |" in start
    assert again.count("- perplexity") == 1
    capsys.readouterr()
    assert cli.run(["eval", "demo", *options]) == 1
    assert "demo: no conversion_report.json" in capsys.readouterr().err


def test_the_verb(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:600])
    options = ["--text", str(text), "--window", "64", "--max-tokens", "90", "--device", "cpu"]
    assert cli.run(["eval", "demo", "--against", "demo", *options]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "top-1 agreement           100.00 %" in shown
    assert cli.run(["eval", "demo", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 89 and found["kl"] is None and found["model"] == "demo"
    assert f"{found['perplexity']:.4f}" in shown
    assert cli.run(["eval", "demo"]) == 2
    assert "--text" in capsys.readouterr().err
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    assert cli.run(["eval", "demo", "--text", str(tmp_path / "bad.txt")]) == 1
    assert "bad.txt: byte 3 is not UTF-8 text" in capsys.readouterr().err
