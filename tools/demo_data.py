"""Text to tokens for the demo training: parallel encoding, shuffled windows, fixed test windows.

`<|endoftext|>` stands in the text between books and becomes token 0; nothing else is marked.
"""

import lzma
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer
from torch import Tensor

_CHUNK_CHARACTERS = 1 << 17
_worker_tokenizer: Tokenizer | None = None


def encode_file(
    path: Path, tokenizer_path: Path, *, max_characters: int | None = None
) -> numpy.ndarray:
    """All tokens of a text file (plain or .xz) as int16, in order; a pool of processes encodes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # fork: this runs before CUDA starts, and costs no second import of torch.
    context = multiprocessing.get_context("fork")
    with context.Pool(os.cpu_count(), _start_worker, (str(tokenizer_path),)) as pool:
        parts = list(pool.imap(_encode, _chunks(path, max_characters), chunksize=1))
    return numpy.concatenate([numpy.frombuffer(part, dtype=numpy.int16) for part in parts])


class TrainingWindows:
    """Windows of length + 1 tokens, shuffled on the device; each pass shifts their grid."""

    def __init__(self, tokens: Tensor, length: int, batch: int, seed: int):
        self.tokens, self.length, self.batch = tokens, length, batch
        self.generator = torch.Generator(tokens.device).manual_seed(seed)
        self.offsets = torch.arange(length + 1, device=tokens.device)
        self.starts = torch.empty(0, dtype=torch.long, device=tokens.device)
        assert (len(tokens) - 1) // length > batch, "too little text for one batch"

    def next(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets), int64 [batch, length] each."""
        if len(self.starts) < self.batch:
            self.starts = self._new_pass()
        starts, self.starts = self.starts[: self.batch], self.starts[self.batch :]
        windows = self.tokens[starts[:, None] + self.offsets].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def _new_pass(self) -> Tensor:
        device, count = self.tokens.device, (len(self.tokens) - 1) // self.length - 1
        shift = torch.randint(self.length, (1,), generator=self.generator, device=device)
        order = torch.randperm(count, generator=self.generator, device=device)
        return order * self.length + shift


def evaluation_windows(tokens: Tensor, length: int) -> Tensor:
    """Non-overlapping windows [count, length] from the first token on; the rest is left out."""
    return tokens[: len(tokens) // length * length].view(-1, length)


def _chunks(path: Path, max_characters: int | None) -> Iterator[str]:
    open_text = lzma.open if path.suffix == ".xz" else open
    rest, seen = "", 0
    with open_text(path, "rt", encoding="utf-8") as file:
        while block := file.read(_CHUNK_CHARACTERS):
            seen += len(block)
            rest += block
            if cut := _last_safe_cut(rest):
                yield rest[:cut]
                rest = rest[cut:]
            if max_characters is not None and seen >= max_characters:
                break
    yield rest


def _last_safe_cut(text: str) -> int:
    """The last place between exactly two newlines, or 0.

    The pre-tokenizer cuts there too, so the tokens of the parts are the tokens of the whole.
    """
    gap = len(text)
    while (gap := text.rfind("\n\n", 0, gap)) > 0:
        around = text[gap - 1] + text[gap + 2 : gap + 3]
        if len(around) == 2 and not around[0].isspace() and not around[1].isspace():
            return gap + 1
    return 0


def _start_worker(tokenizer_path: str) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.from_file(tokenizer_path)


def _encode(text: str) -> bytes:
    assert _worker_tokenizer is not None
    ids = _worker_tokenizer.encode_batch_fast([text])[0].ids
    return numpy.array(ids, dtype=numpy.int16).tobytes()
