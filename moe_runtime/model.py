"""MoeModel: a checkpoint opened on a device, and everything one does with it."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from loaders import hub
from loaders.checkpoint import open_files, open_folder
from loaders.files import CheckpointFiles
from moe_runtime.backend import Backend
from moe_runtime.backends import create_backend
from moe_runtime.bundled import BUNDLED
from moe_runtime.config import DecoderConfig
from moe_runtime.dsml import DsmlText, DsmlTokens
from moe_runtime.generate import MAX_LOGPROBS, Generation, Request, StopOn, TextStream
from moe_runtime.generation_config import GenerationDefaults
from moe_runtime.harmony import HarmonyTokens
from moe_runtime.models.registry import plan_model
from moe_runtime.output_text import ChannelText, OutputText, PlainText
from moe_runtime.plan import MemoryPlan
from moe_runtime.prompt import EncodedPrompt, Prompt, check_token_ids, encode_prompt
from moe_runtime.start_times import StartTimes
from moe_runtime.stop_strings import check_stops
from moe_runtime.thinking import ThinkingText, ThinkTokens
from moe_runtime.tokenizer import Tokenizer, load_tokenizer

MAX_NEW_TOKENS = 256  # of a request that names no limit
MAX_NEW_TOKENS_CHAT = 4096  # the same for a chat: a reply may come after much reasoning
PERPLEXITY_WINDOW = 1024  # tokens; bounds the logits in memory, not the model


class MoeModel:
    """One model, one sequence at a time. A context manager; `close` frees the device's memory.

        with MoeModel.from_pretrained("openai/gpt-oss-20b") as model:
            for chunk in model.stream([{"role": "user", "content": "Why is the sky blue?"}]):
                print(chunk.text, end="", flush=True)

    A request that begins while another stream is open ends that stream.
    """

    def __init__(
        self,
        backend: Backend,
        config: DecoderConfig,
        *,
        tokenizer: Tokenizer | None = None,
        defaults: GenerationDefaults | None = None,
        load_s: float | None = None,
    ) -> None:
        """From parts; most callers want `from_pretrained`.

        tokenizer: None works on token ids alone; all text is "" then
        """
        self.config = config
        self._backend: Backend | None = backend
        self._tokenizer = tokenizer
        self._harmony = HarmonyTokens.find(tokenizer) if tokenizer else None
        self._thinking = ThinkTokens.find(tokenizer) if tokenizer else None
        self._dsml = DsmlTokens.find(tokenizer) if tokenizer else None
        self._defaults = defaults or GenerationDefaults.read(
            None, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids
        )
        self._load_s = load_s
        self.start_times: dict[str, float] = {}  # seconds of the parts of opening it
        self._stream: TextStream | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        device: str = "auto",
        backend: str = "auto",
        dtype: str = "auto",
        dense_format: str = "as-published",
        max_context: int | None = None,
        activations: str = "exact",
        local_files_only: bool = False,
        progress: bool = True,
    ) -> MoeModel:
        """Open a checkpoint: a folder, a hub id, or "demo" for the one in the package.

        revision:         branch, tag or commit of a hub model
        device:           "auto" (a CUDA device if there is one that fits), "cpu", "cuda", "cuda:1"
        backend:          "auto", "reference" (plain torch in fp32: the numbers to trust), "triton"
        dtype:            of the activations: "auto" is fp32 for reference and bf16 for triton
        dense_format:     "as-published", or "fp8": attention and head are packed while loading,
                          one scale a row; experts and embedding stay as they are
        max_context:      tokens the KV cache is made for; default what the model allows and fits
        activations:      "exact", or "vendor" to round them to FP8 before quantized weights as the
                          code that DeepSeek V3 and V4 were published with does (reference)
        local_files_only: never ask the hub
        progress:         bars and notes on stderr

        Raises CheckpointError, UnsupportedModelError or DoesNotFitError before anything large is
        allocated, ValueError for a bad argument.
        """
        started = time.perf_counter()
        if max_context is not None:
            _check_count("max_context", max_context, 1)
        times = StartTimes()
        with ExitStack() as opened_files:
            with times.part("open"):
                folder = hub.resolve(
                    str(path_or_id),
                    revision=revision,
                    local_files_only=local_files_only,
                    progress=progress,
                    bundled=BUNDLED,
                    before_weights=_check_headers,
                )
                checkpoint = opened_files.enter_context(open_folder(folder))
                opened = plan_model(checkpoint)
                config = opened.config
                # Everything that can be wrong in small files is found before the weights are read.
                make_chat = opened.family.chat_code
                chat_code = make_chat(checkpoint) if make_chat else None
                tokenizer = load_tokenizer(checkpoint, config.vocab_size, chat_code=chat_code)
                defaults = GenerationDefaults.read(
                    checkpoint.generation_config,
                    vocab_size=config.vocab_size,
                    eos_token_ids=config.eos_token_ids,
                )
            made = create_backend(
                checkpoint,
                opened,
                device=device,
                backend=backend,
                dtype=dtype,
                dense_format=dense_format,
                max_context=max_context,
                activations=activations,
                progress=progress,
                times=times,
            )
        load_s = time.perf_counter() - started
        model = cls(made, config, tokenizer=tokenizer, defaults=defaults, load_s=load_s)
        model.start_times = times.seconds
        return model

    @property
    def tokenizer(self) -> Tokenizer:
        """Encodes, decodes and applies the chat template; ValueError if there is none."""
        if self._tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer.json: work with token ids")
        return self._tokenizer

    @property
    def plan(self) -> MemoryPlan:
        """Bytes by component, of the device's memory and of one token's reads."""
        return self._open_backend().plan

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._open_backend().device

    @property
    def backend(self) -> str:
        """What computes: "reference" or "triton"."""
        return self._open_backend().name

    @property
    def open_backend(self) -> Backend:
        """What runs the model, for those who measure it; ValueError once it is closed."""
        return self._open_backend()

    @property
    def max_context(self) -> int:
        """Tokens that fit the cache: prompt and new ones together."""
        return self._open_backend().max_context

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        eos_token_ids: int | Sequence[int] | None = None,
        ignore_eos: bool = False,
        logprobs: int = 0,
        stop_on: StopOn | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Continue a prompt until it ends; the arguments are those of `stream`."""
        stream = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            eos_token_ids=eos_token_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            stop_on=stop_on,
            tools=tools,
            template_options=template_options,
        )
        with stream:
            for _ in stream:
                pass
        return stream.result

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        eos_token_ids: int | Sequence[int] | None = None,
        ignore_eos: bool = False,
        logprobs: int = 0,
        stop_on: StopOn | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> TextStream:
        """Continue a prompt chunk by chunk; `result` of the iterator is the Generation so far.

        prompt:             text (encoded as it is), token ids, or chat messages
        max_new_tokens:     default 256, or 4096 for a chat; cut to what the context leaves
        temperature:        0.0 is greedy; defaults come from generation_config.json, else greedy
        top_p, top_k, min_p, repetition_penalty: see SamplingParams
        seed:               repeats a sampled output; None draws one, found in Generation.seed
        stop:               texts that end the output; they are not part of it. In a chat with
                            channels they count in the reply, not in the reasoning
        eos_token_ids:      tokens that end the output; default those of the checkpoint
        ignore_eos:         go on past them
        logprobs:           alternatives to report for each token, 0 to 20
        stop_on:            an event, or a function that returns true to end the output: it is
                            asked before each token, and the finish reason is "cancelled"
        tools, template_options: for a chat's template, see Tokenizer.apply_chat_template

        In a chat with channels (GPT-OSS) the text of chunks is the reply: preambles and the final
        answer. Reasoning is in `reasoning`, tool calls are in `result.tool_calls`. Any other
        output is text without its control tokens.

        Everything is checked here: ValueError says what is wrong. Work begins with the first chunk.
        """
        started = time.perf_counter()
        backend = self._open_backend()
        encoded = encode_prompt(
            prompt,
            self._tokenizer,
            vocab_size=backend.vocab_size,
            tools=tools,
            template_options=template_options,
        )
        sampling = self._defaults.sampling_for(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=secrets.randbits(32) if seed is None else seed,
        )
        output = self._output(encoded, check_stops(stop))
        request = Request(
            prompt_ids=encoded.token_ids,
            sampling=sampling,
            max_new_tokens=self._num_new_tokens(encoded, max_new_tokens),
            eos_token_ids=self._eos(output, eos_token_ids, ignore_eos=ignore_eos),
            num_logprobs=_check_count("logprobs", logprobs, 0, MAX_LOGPROBS),
            stop_on=_check_stop_on(stop_on),
            load_s=self._load_s,
            encode_s=time.perf_counter() - started,
        )
        self._end_stream()
        self._stream = TextStream(backend, request, output)
        return self._stream

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Teacher-forced logits [T, V] fp32 on the CPU: row t predicts token t + 1."""
        backend = self._open_backend()
        ids = self._ids_in_context(token_ids)
        self._end_stream()
        return backend.logits(ids)

    def perplexity(self, text_or_ids: str | Sequence[int], *, window: int | None = None) -> float:
        """exp of the mean negative log-likelihood of every token but the first.

        window: tokens read at once; default the smaller of max_context and 1024, which bounds the
                logits in memory

        A longer text is read in windows that overlap by half: each token is scored once, with at
        least half a window before it (all of the text before it, in the first window).
        """
        backend = self._open_backend()
        ids = encode_prompt(text_or_ids, self._tokenizer, vocab_size=backend.vocab_size).token_ids
        if len(ids) < 2:
            raise ValueError(f"perplexity needs at least 2 tokens, got {len(ids)}")
        largest = backend.max_context
        size = min(largest, PERPLEXITY_WINDOW) if window is None else window
        _check_count("window", size, 2, largest)
        self._end_stream()
        total = 0.0
        scored = 1  # tokens scored or, the first one, never scored
        while scored < len(ids):
            start = 0 if scored == 1 else scored - size // 2
            part = ids[start : start + size]
            total += _negative_log_likelihood(backend.logits(part), part, scored - start)
            scored = start + len(part)
        return math.exp(total / (len(ids) - 1))

    def close(self) -> None:
        """End what runs and free the device's memory; the model cannot be used again."""
        self._end_stream()
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def __enter__(self) -> MoeModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open_backend(self) -> Backend:
        if self._backend is None:
            raise ValueError("the model is closed: open it again with from_pretrained")
        return self._backend

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _output(self, prompt: EncodedPrompt, stops: tuple[str, ...]) -> OutputText:
        tokenizer, harmony = self._tokenizer, self._harmony
        if tokenizer is None:
            if stops:
                raise ValueError("stop needs a tokenizer, and the checkpoint has none")
            return PlainText(_NoText(), ())
        if harmony is not None and prompt.is_chat and harmony.start in prompt.token_ids:
            return ChannelText(tokenizer, harmony, prompt.token_ids, stops)
        if self._thinking is not None and self._dsml is not None and prompt.is_chat:
            return DsmlText(tokenizer, self._thinking, self._dsml, prompt.token_ids, stops)
        if self._thinking is not None and prompt.is_chat:
            return ThinkingText(tokenizer, self._thinking, prompt.token_ids, stops)
        return PlainText(tokenizer.detokenizer(), stops)

    def _eos(
        self, output: OutputText, eos_token_ids: int | Sequence[int] | None, *, ignore_eos: bool
    ) -> frozenset[int]:
        if ignore_eos:
            return frozenset()
        if eos_token_ids is not None:
            given = [eos_token_ids] if isinstance(eos_token_ids, int) else eos_token_ids
            size = self.config.vocab_size
            return frozenset(check_token_ids(given, size, where="eos_token_ids"))
        ids = frozenset(self._defaults.eos_token_ids)
        # Early generation configs lack <|call|>; without it a chat runs on past its tool call.
        if self._harmony is not None and isinstance(output, ChannelText):
            ids |= frozenset(self._harmony.stop_ids)
        return ids

    def _num_new_tokens(self, prompt: EncodedPrompt, asked: int | None) -> int:
        """Tokens to make at most; ValueError if the prompt leaves no room for one."""
        default = MAX_NEW_TOKENS_CHAT if prompt.is_chat else MAX_NEW_TOKENS
        count = _check_count("max_new_tokens", default if asked is None else asked, 1)
        self._ids_in_context(prompt.token_ids, room=1)
        return min(count, self.max_context - len(prompt.token_ids))

    def _ids_in_context(self, token_ids: Sequence[int], *, room: int = 0) -> list[int]:
        ids = check_token_ids(token_ids, self.config.vocab_size)
        if not ids:
            raise ValueError("no token ids: give at least one")
        if len(ids) + room > self.max_context:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the context holds {self.max_context}: "
                "shorten it, or open the model with a larger max_context (--max-context)"
            )
        return ids


class _NoText:
    """The detokenizer of a model without a tokenizer."""

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def _check_headers(files: CheckpointFiles) -> None:
    """Refuse a checkpoint that cannot be opened before its weights are downloaded."""
    plan_model(open_files(files))


def _negative_log_likelihood(logits_TV: torch.Tensor, ids: Sequence[int], first: int) -> float:
    """Sum over tokens `first` and later of ids, each predicted by the row before it."""
    rows = logits_TV[first - 1 : len(ids) - 1]
    targets = torch.tensor(ids[first:])
    chosen = rows.gather(1, targets[:, None])[:, 0]
    return float((rows.logsumexp(dim=1) - chosen).double().sum())


def _check_count(name: str, value: Any, least: int, most: int = 2**31 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        upper = "" if most == 2**31 - 1 else f" to {most}"
        raise ValueError(
            f"{name} must be a whole number, {least}{upper or ' or more'}, got {value!r}"
        )
    return value


def _check_stop_on(stop_on: Any) -> StopOn | None:
    if stop_on is None or callable(stop_on) or hasattr(stop_on, "is_set"):
        return stop_on  # type: ignore[no-any-return]
    raise ValueError(f"stop_on must be an event or a function, got {type(stop_on).__name__}")
