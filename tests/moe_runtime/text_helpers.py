"""Shared by the tests of text and generation: tiny tokenizers, a template, a fake backend."""

from __future__ import annotations

import json
from functools import lru_cache
from types import SimpleNamespace

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from moe_runtime.backend import SampledToken
from moe_runtime.config import ModelConfig, YarnRope
from moe_runtime.tokenizer import Tokenizer

HARMONY_TOKENS = (
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|constrain|>",
    "<|endoftext|>",
)
CORPUS = (
    "assistant analysis commentary final user system developer functions weather json to= "
    "The quick brown fox jumps over the lazy dog. na\u00efve caf\u00e9 \u4f60\u597d "
    "\uff0c\u4e16\u754c \U0001f600 \U0001f469\u200d\U0001f680 hello world, the end."
)

# GPT-OSS-like: headers, channels, analysis dropped once a final answer followed, tools as a
# namespace. Written for these tests.
HARMONY_TEMPLATE = """\
{%- macro turn(role, text, close) -%}
<|start|>{{ role }}<|message|>{{ text }}{{ close }}
{%- endmacro -%}
{%- set effort = reasoning_effort | default("medium", true) -%}
{{- turn("system", "Today is " ~ (today or strftime_now("%Y-%m-%d")) ~ ". Reasoning: " ~ effort
         ~ ".\\n# Valid channels: analysis, commentary, final.", "<|end|>") }}
{%- if tools %}
    {{- "<|start|>developer<|message|># Tools\\nnamespace functions {\\n" }}
    {%- for tool in tools %}
        {{- "type " ~ tool.function.name ~ " = " ~ (tool.function.parameters | tojson) ~ ";\\n" }}
    {%- endfor %}
    {{- "}<|end|>" }}
{%- endif %}
{%- set ns = namespace(last_final=-1) %}
{%- for message in messages %}
    {%- if message.role == "assistant" and not message.tool_calls %}
        {%- set ns.last_final = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- generation %}
        {%- if message.thinking and loop.index0 > ns.last_final %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" ~ message.thinking ~ "<|end|>" }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- "<|start|>assistant<|channel|>commentary to=functions." ~ call.function.name }}
            {{- " <|constrain|>json<|message|>" ~ (call.function.arguments | tojson) ~ "<|call|>" }}
        {%- else %}
            {{- "<|start|>assistant<|channel|>final<|message|>" ~ message.content ~ "<|end|>" }}
        {%- endfor %}
        {%- endgeneration %}
    {%- elif message.role == "tool" %}
        {%- if not message.name %}{% continue %}{% endif %}
        {{- "<|start|>functions." ~ message.name ~ " to=assistant<|channel|>commentary" }}
        {{- "<|message|>" ~ (message.content | tojson) ~ "<|end|>" }}
    {%- elif message.role in ("user", "system", "developer") %}
        {{- turn(message.role, message.content, "<|end|>") }}
    {%- else %}
        {{- raise_exception("unknown role: " ~ message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start|>assistant" }}{% endif %}
"""


@lru_cache(maxsize=1)
def byte_level_json() -> str:
    """A byte-level BPE of about 400 entries with the control tokens of harmony."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
    )
    tokenizer.train_from_iterator([CORPUS] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in HARMONY_TOKENS])
    tokenizer.add_tokens(["<think>"])  # an added token that is ordinary text
    return tokenizer.to_str()


@lru_cache(maxsize=1)
def byte_fallback_json() -> str:
    """A Llama-like tokenizer: spaces as U+2581, unknown characters as byte tokens."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["\u2581"] + [chr(c) for c in range(0x21, 0x7F)]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "a"), ("\u2581", "\u2581")]
    words = ["th", "the", "\u2581the", "\u2581a", "\u2581\u2581", "\ufffd"]
    vocab = {piece: i for i, piece in enumerate(pieces + letters + words)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    return tokenizer.to_str()


@lru_cache(maxsize=1)
def word_piece_json() -> str:
    """A BERT-like tokenizer, whose decoder puts spaces between words."""
    words = ["[UNK]", "hello", "world", "##s", "##ly", ",", ".", "a", "don", "'", "t"]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer.to_str()


@lru_cache(maxsize=1)
def harmony_tokenizer() -> Tokenizer:
    """The byte-level tokenizer with the harmony template."""
    return Tokenizer.from_json(
        byte_level_json(),
        chat_templates={"default": HARMONY_TEMPLATE},
        named_tokens={"eos_token": "<|return|>"},
    )


@lru_cache(maxsize=1)
def plain_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without control tokens of harmony, with a plain chat template."""
    data = json.loads(byte_level_json())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] == "<|endoftext|>"]
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    return Tokenizer.from_json(json.dumps(data), chat_templates={"default": template})


def tiny_config(vocab_size: int) -> ModelConfig:
    """A config that no weights belong to."""
    return ModelConfig(
        family="gpt_oss",
        num_layers=2,
        model_width=32,
        num_heads=2,
        num_kv_heads=1,
        head_width=16,
        num_experts=4,
        experts_per_token=2,
        expert_width=32,
        vocab_size=vocab_size,
        sliding_window=8,
        layer_is_sliding=(True, False),
        norm_eps=1e-5,
        rope=YarnRope(150000.0, 32.0, 32.0, 1.0, 64, False),
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
        max_context=256,
        eos_token_ids=(),
    )


class FakeBackend:
    """Plays a script of token ids and notes what was asked of it.

    After the script it goes on with token 0. Log probability of a token: minus its position.
    """

    name = "fake"
    device = torch.device("cpu")
    read_bandwidth = None
    plan = SimpleNamespace(decode_bytes=lambda context: {"experts": 1})

    def __init__(self, script, *, vocab_size, max_context=256):
        self.script = list(script)
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.requests = []
        self.taken = 0  # tokens that the caller asked for in the last request
        self.running = False
        self.closed = False
        self.fail_at = None  # (number of tokens, exception)

    def decode(self, prompt_ids, sampling, *, max_new_tokens, num_logprobs=0):
        assert not self.running, "the last iterator was not closed"
        self.requests.append((list(prompt_ids), sampling, max_new_tokens, num_logprobs))
        self.taken = 0
        self.running = True
        try:
            for i in range(max_new_tokens):
                if self.fail_at and self.fail_at[0] == i:
                    raise self.fail_at[1]
                token = self.script[i] if i < len(self.script) else 0
                self.taken += 1
                top = tuple((j, -float(j)) for j in range(num_logprobs))
                yield SampledToken(token, -float(i), top)
        finally:
            self.running = False

    def logits(self, token_ids):
        """Row t depends on token t alone; scaled so that the choice of row and column shows."""
        table = torch.randn(self.vocab_size, self.vocab_size, generator=_seeded(3)) * 2
        return table[torch.tensor(list(token_ids))]

    def close(self):
        self.closed = True


def _seeded(seed):
    return torch.Generator().manual_seed(seed)
