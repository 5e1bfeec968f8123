"""MoeModel over a backend that plays a script: text, ends, channels, cancellation, bad requests."""

import math
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from loaders.errors import CheckpointError
from moe_runtime import model as model_module
from moe_runtime.generation_config import GenerationDefaults
from moe_runtime.harmony import ToolCall
from moe_runtime.model import MoeModel
from tests.moe_runtime.text_helpers import (
    FakeBackend,
    byte_level_json,
    harmony_tokenizer,
    plain_tokenizer,
    tiny_config,
)

TOKENIZER = harmony_tokenizer()
VOCAB = 450
END_OF_TEXT = TOKENIZER.token_id("<|endoftext|>")
CHAT = [{"role": "user", "content": "hi"}]


def make(script="", *, tokenizer=TOKENIZER, max_context=256, **generation_config):
    """A model whose backend will say the script (text or ids)."""
    ids = tokenizer.encode(script) if isinstance(script, str) and script else list(script)
    backend = FakeBackend(ids, vocab_size=VOCAB, max_context=max_context)
    defaults = GenerationDefaults.read(
        {"eos_token_id": [END_OF_TEXT], **generation_config}, vocab_size=VOCAB, eos_token_ids=()
    )
    model = MoeModel(backend, tiny_config(VOCAB), tokenizer=tokenizer, defaults=defaults)
    return model, backend


# Text and its ends.


def test_text_until_the_stop_token():
    model, backend = make("The quick brown fox<|endoftext|> jumps")
    out = model.generate("hello")
    assert out.text == out.answer == "The quick brown fox"
    assert out.token_ids == TOKENIZER.encode("The quick brown fox")
    assert (out.finish_reason, out.reasoning, out.tool_calls) == ("stop", "", ())
    assert out.prompt_tokens == len(TOKENIZER.encode("hello"))
    assert backend.taken == len(out.token_ids) + 1
    assert not backend.running


def test_a_prompt_reaches_the_backend_as_it_is():
    model, backend = make()
    model.generate("hello<|end|>", max_new_tokens=1)
    model.generate([5, 6, 7], max_new_tokens=1)
    model.generate(torch.tensor([5, 6, 7]), max_new_tokens=1)
    model.generate(CHAT, max_new_tokens=1)
    sent = [ids for ids, *_ in backend.requests]
    assert sent[0] == TOKENIZER.encode("hello<|end|>")
    assert sent[1] == sent[2] == [5, 6, 7]
    assert sent[3] == TOKENIZER.apply_chat_template(CHAT)


def test_tools_and_options_reach_the_template():
    model, backend = make()
    options = {"reasoning_effort": "high"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    model.generate(CHAT, max_new_tokens=1, tools=tools, template_options=options)
    expected = TOKENIZER.apply_chat_template(CHAT, tools=tools, template_options=options)
    assert backend.requests[0][0] == expected


@pytest.mark.parametrize("asked", [1, 3])
def test_length(asked):
    model, _ = make("The quick brown fox jumps over")
    out = model.generate("hello", max_new_tokens=asked)
    assert len(out.token_ids) == asked
    assert out.finish_reason == "length"


def test_new_tokens_are_cut_to_what_the_context_leaves():
    model, backend = make("The quick brown fox", max_context=10)
    out = model.generate([1] * 7, max_new_tokens=100)
    assert (len(out.token_ids), out.finish_reason) == (3, "length")
    assert backend.requests[0][2] == 3


def test_default_number_of_new_tokens():
    model, backend = make(max_context=100_000)
    with model.stream([1]) as stream:
        next(stream)
    with model.stream(CHAT) as stream:
        next(stream)
    assert [request[2] for request in backend.requests] == [256, 4096]


def test_ignore_eos_and_own_stop_tokens():
    model, _ = make("a<|endoftext|>b")
    ids = TOKENIZER.encode("a<|endoftext|>b")
    assert model.generate([1], max_new_tokens=3, ignore_eos=True).token_ids == ids
    assert model.generate([1], max_new_tokens=3, eos_token_ids=[ids[2]]).token_ids == ids[:2]
    assert model.generate([1], max_new_tokens=3, eos_token_ids=ids[2]).token_ids == ids[:2]
    assert model.generate([1], max_new_tokens=3, eos_token_ids=[]).token_ids == ids


def test_stop_tokens_of_the_config_serve_when_the_file_names_none():
    defaults = GenerationDefaults.read(None, vocab_size=VOCAB, eos_token_ids=(7,))
    assert defaults.eos_token_ids == (7,)
    defaults = GenerationDefaults.read({"eos_token_id": 8}, vocab_size=VOCAB, eos_token_ids=(7,))
    assert defaults.eos_token_ids == (8,)


def test_stop_string_across_tokens():
    model, backend = make("The quick brown fox")
    out = model.generate([1], stop="ck br", max_new_tokens=50)
    assert (out.text, out.finish_reason) == ("The qui", "stop")
    # The ids hold the stop string, and no token after the one that completed it.
    assert "ck br" in TOKENIZER.decode(out.token_ids)
    assert "ck br" not in TOKENIZER.decode(out.token_ids[:-1])
    assert backend.taken == len(out.token_ids) < 50


def test_held_text_comes_at_the_end():
    """A beginning of a stop string that never came, and half a character."""
    first_byte = next(i for i in range(300) if TOKENIZER.token_bytes(i) == b"\xf0")
    model, _ = make([*TOKENIZER.encode("hello world"), first_byte])
    count = len(TOKENIZER.encode("hello world")) + 1
    chunks = list(model.stream([1], stop=["world peace"], max_new_tokens=count))
    assert "".join(c.text for c in chunks) == "hello world\ufffd"
    assert [c.token_id for c in chunks][-1] is None
    assert len(chunks) == count + 1


@pytest.mark.parametrize("stop", [None, "fox", ["\U0001f680", "zzz"]])
@pytest.mark.parametrize("prompt", ["hello", CHAT], ids=["text", "chat"])
def test_chunks_join_to_the_generation(prompt, stop):
    script = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
    model, _ = make(
        script + "na\u00efve \U0001f469\u200d\U0001f680 \u4f60\u597d brown fox.<|return|>"
    )
    stream = model.stream(prompt, stop=stop, logprobs=2)
    chunks = list(stream)
    out = model.generate(prompt, stop=stop, logprobs=2)
    assert "".join(c.text for c in chunks) == out.text == stream.result.text
    assert "".join(c.reasoning for c in chunks) == out.reasoning
    with_token = [c for c in chunks if c.token_id is not None]
    assert [c.token_id for c in with_token] == out.token_ids
    assert [c.logprob for c in with_token] == [t.logprob for t in out.logprobs]
    assert [c.top_logprobs for c in with_token] == [t.top_logprobs for t in out.logprobs]


def test_logprobs():
    model, backend = make("The quick brown fox")
    out = model.generate([1], max_new_tokens=3, logprobs=2)
    assert [t.token_id for t in out.logprobs] == out.token_ids
    assert [t.logprob for t in out.logprobs] == [0.0, -1.0, -2.0]
    assert out.logprobs[1].top_logprobs == ((0, 0.0), (1, -1.0))
    assert backend.requests[0][3] == 2


# Sampling parameters.


def sampling_of(model, backend, **arguments):
    model.generate([1], max_new_tokens=1, **arguments)
    return backend.requests[-1][1]


def test_without_defaults_a_request_is_greedy():
    model, backend = make()
    assert sampling_of(model, backend).greedy
    assert sampling_of(model, backend, temperature=0.7).temperature == 0.7
    asked = sampling_of(model, backend, top_p=0.9)
    assert (asked.temperature, asked.top_p) == (1.0, 0.9)


def test_defaults_come_from_the_file():
    model, backend = make(do_sample=True, temperature=0.6, top_k=40, top_p=0.95, min_p=None)
    used = sampling_of(model, backend)
    assert (used.temperature, used.top_k, used.top_p, used.min_p) == (0.6, 40, 0.95, 0.0)
    used = sampling_of(model, backend, temperature=0.0)
    assert used.greedy
    used = sampling_of(model, backend, temperature=2, top_k=0, top_p=1.0, repetition_penalty=1.1)
    assert (used.temperature, used.top_k, used.top_p) == (2, 0, 1.0)
    assert used.repetition_penalty == 1.1


def test_a_file_without_do_sample_is_greedy_whatever_else_it_says():
    model, backend = make(temperature=0.6, top_k=-1)
    assert sampling_of(model, backend).greedy
    used = sampling_of(model, backend, min_p=0.1)
    assert (used.temperature, used.min_p, used.top_k) == (0.6, 0.1, 0)


def test_seed_is_drawn_and_recorded():
    model, backend = make()
    seeds = [model.generate([1], max_new_tokens=1).seed for _ in range(4)]
    assert len(set(seeds)) > 1
    assert seeds == [sampling.seed for _, sampling, *_ in backend.requests]
    assert model.generate([1], max_new_tokens=1, seed=2**64 - 1).seed == 2**64 - 1


BAD_DEFAULTS = {
    "temperature": ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
    "negative": ({"temperature": -1}, "temperature must be 0 or more, got -1"),
    "top_p": ({"top_p": 1.5}, "top_p must be above 0, at most 1, got 1.5"),
    "top_k": ({"top_k": 2.5}, "top_k must be a whole number, got 2.5"),
    "do_sample": ({"do_sample": "yes"}, "do_sample: expected true or false"),
    "eos": ({"eos_token_id": [VOCAB]}, f"eos_token_id: {VOCAB} is outside the vocabulary"),
    "eos text": ({"eos_token_id": "x"}, "eos_token_id: expected whole numbers"),
    "not finite": ({"repetition_penalty": math.inf}, "repetition_penalty must be above 0"),
}


@pytest.mark.parametrize(("values", "error"), BAD_DEFAULTS.values(), ids=BAD_DEFAULTS)
def test_bad_generation_config(values, error):
    with pytest.raises(CheckpointError, match="generation_config.json: " + error):
        GenerationDefaults.read(values, vocab_size=VOCAB, eos_token_ids=())


# Chats with channels.

REPLY = (
    "<|channel|>analysis<|message|>They greet.<|end|>"
    "<|start|>assistant<|channel|>commentary<|message|>One moment.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Hello, world<|return|>"
)


def test_a_reply_is_taken_apart():
    model, _ = make(REPLY)
    out = model.generate(CHAT)
    assert out.text == "One moment.\n\nHello, world"
    assert out.answer == "Hello, world"
    assert out.reasoning == "They greet."
    assert out.finish_reason == "stop"
    assert TOKENIZER.token_id("<|return|>") not in out.token_ids


def test_chunks_tell_the_channel_and_hold_no_header():
    model, _ = make(REPLY)
    chunks = list(model.stream(CHAT))
    by_channel = {}
    for chunk in chunks:
        if chunk.text or chunk.reasoning:
            by_channel.setdefault(chunk.channel, []).append(chunk.text + chunk.reasoning)
    joined = {channel: "".join(texts) for channel, texts in by_channel.items()}
    assert joined == {
        "analysis": "They greet.",
        "commentary": "One moment.",
        "final": "\n\nHello, world",
    }
    assert all(not c.text for c in chunks if c.channel == "analysis")
    assert chunks[0].channel is None  # the <|channel|> token


def test_a_text_prompt_in_the_chat_format_is_not_taken_apart():
    model, _ = make(REPLY, eos_token_id=TOKENIZER.token_id("<|return|>"))
    out = model.generate("<|start|>user<|message|>hi<|end|><|start|>assistant")
    assert out.reasoning == ""
    assert out.text.startswith("analysisThey greet.")


@pytest.mark.parametrize("eos", [[END_OF_TEXT], [TOKENIZER.token_id("<|call|>")]])
def test_a_tool_call_ends_the_turn(eos):
    """Also when generation_config.json does not name <|call|>."""
    model, _ = make(
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        '{"city": "Oslo"}<|call|><|start|>assistant<|channel|>final<|message|>no<|return|>',
        eos_token_id=eos,
    )
    out = model.generate(CHAT)
    expected = ToolCall("weather", '{"city": "Oslo"}', "functions.weather", "json", complete=True)
    assert out.tool_calls == (expected,)
    assert (out.text, out.finish_reason) == ("", "stop")


def test_stop_strings_count_in_the_reply_alone():
    model, _ = make(
        "<|channel|>analysis<|message|>the end. go on<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>the<|end|>"
        "<|start|>assistant<|channel|>final<|message|> end. It is the end. More<|return|>"
    )
    out = model.generate(CHAT, stop="the end.")
    assert out.reasoning == "the end. go on"
    assert out.text == "the\n\n end. It is "
    assert out.answer == " end. It is "
    assert out.finish_reason == "stop"


def test_several_messages_of_reasoning_are_parted():
    model, _ = make(
        "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>analysis<|message|>"
        "two<|end|><|start|>assistant<|channel|>final<|message|>x<|return|>"
    )
    chunks = list(model.stream(CHAT))
    assert "".join(c.reasoning for c in chunks) == "one\n\ntwo"


def test_a_reply_without_structure_is_its_text():
    model, _ = make("Hello, world<|return|>")
    out = model.generate(CHAT)
    assert (out.text, out.answer, out.reasoning) == ("Hello, world", "Hello, world", "")


def test_a_chat_of_a_model_without_channels():
    tokenizer = plain_tokenizer()
    model, backend = make("hello world", tokenizer=tokenizer)
    out = model.generate(CHAT, max_new_tokens=len(backend.script))
    assert out.text == out.answer == "hello world"
    assert tokenizer.decode(backend.requests[0][0]) == "user: hi\nassistant:"


# Ending early.


def test_an_event_cancels():
    model, backend = make("The quick brown fox jumps")
    event = threading.Event()
    texts = []
    stream = model.stream([1], stop_on=event)
    for chunk in stream:
        texts.append(chunk.text)
        if len(texts) == 2:
            event.set()
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.text == "".join(texts)
    assert backend.taken == 2 and not backend.running


def test_a_function_cancels_before_the_first_token():
    model, backend = make("The quick brown fox")
    out = model.generate([1], stop_on=lambda: True)
    assert (out.text, out.token_ids, out.finish_reason) == ("", [], "cancelled")
    assert backend.taken == 0


def test_closing_a_stream_ends_the_work():
    model, backend = make("The quick brown fox")
    stream = model.stream([1])
    next(stream)
    assert backend.running
    stream.close()
    assert not backend.running
    assert stream.result.finish_reason == "cancelled"
    assert list(stream) == []
    assert model.generate([1], max_new_tokens=1).finish_reason == "length"


def test_a_new_request_ends_an_open_stream():
    """As after Ctrl-C in a loop over a stream, which nobody closes."""
    model, backend = make("The quick brown fox")
    old = model.stream([1])
    next(old)
    assert model.generate([1], max_new_tokens=2).token_ids == backend.script[:2]
    assert list(old) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_usable_after_an_interrupt(failure):
    model, backend = make("The quick brown fox")
    backend.fail_at = (2, failure())
    stream = model.stream([1])
    with pytest.raises(failure):
        list(stream)
    assert not backend.running
    assert len(stream.result.token_ids) == 2
    backend.fail_at = None
    assert len(model.generate([1], max_new_tokens=5).token_ids) == 5


def test_nothing_is_computed_before_the_first_chunk_is_asked_for():
    model, backend = make("The quick")
    stream = model.stream([1])
    assert backend.requests == []
    stream.close()
    assert list(stream) == []


def test_close():
    model, backend = make("The quick brown fox")
    with model:
        next(model.stream([1]))
    assert backend.closed and not backend.running
    model.close()
    for use in (lambda: model.generate([1]), lambda: model.logits([1]), lambda: model.device):
        with pytest.raises(ValueError, match="the model is closed"):
            use()


# Bad requests.

BAD_REQUESTS = {
    "empty text": ("", {}, "the prompt is empty"),
    "empty list": ([], {}, "the prompt is empty"),
    "nothing": (None, {}, "a prompt is a text, .* got NoneType"),
    "a number": (3, {}, "a prompt is a text, .* got int"),
    "id too large": ([1, VOCAB], {}, f"token id 1 of the prompt: .* 0 to {VOCAB - 1}, got {VOCAB}"),
    "negative id": ([-1], {}, "token id 0 of the prompt: .* got -1"),
    "float id": ([1.0], {}, "token id 0 of the prompt: .* got 1.0"),
    "bool id": ([True], {}, "token id 0 of the prompt: .* got True"),
    "nested ids": ([[1, 2]], {}, r"token id 0 of the prompt: .* got \[1, 2\]"),
    "text among ids": ([1, "a"], {}, "token id 1 of the prompt: .* got 'a'"),
    "unknown role": ([{"role": "robot", "content": "x"}], {}, "role must be one of"),
    "too long": ([1] * 256, {}, "the prompt has 256 tokens and the context holds 256"),
    "much too long": ([1] * 300, {}, "the prompt has 300 tokens and the context holds 256"),
    "no new tokens": ([1], {"max_new_tokens": 0}, "max_new_tokens must be .* 1 or more, got 0"),
    "text as count": ([1], {"max_new_tokens": "5"}, "max_new_tokens must be .* got '5'"),
    "temperature": ([1], {"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
    "nan": ([1], {"temperature": math.nan}, "temperature must be 0 or more, got nan"),
    "top_p": ([1], {"top_p": 0.0}, "top_p must be above 0"),
    "top_k": ([1], {"top_k": -2}, "top_k must be 0 or more"),
    "min_p": ([1], {"min_p": 1.0}, "min_p must be 0 or more, below 1"),
    "penalty": ([1], {"repetition_penalty": 0}, "repetition_penalty must be above 0"),
    "seed": ([1], {"seed": -1}, "seed must be from 0"),
    "seed type": ([1], {"seed": 1.5}, "seed must be a whole number"),
    "logprobs": ([1], {"logprobs": 21}, "logprobs must be a whole number, 0 to 20, got 21"),
    "empty stop": ([1], {"stop": ["a", ""]}, "stop: expected a text or a list of texts"),
    "stop type": ([1], {"stop": [3]}, "stop: expected .* got 3"),
    "stop number": ([1], {"stop": 3}, "stop: expected .* got 3"),
    "eos": ([1], {"eos_token_ids": [VOCAB]}, "token id 0 of eos_token_ids: .* got 450"),
    "stop_on": ([1], {"stop_on": 3}, "stop_on must be an event or a function, got int"),
    "tools": ("hi", {"tools": [{}]}, "tools and template_options belong to chat messages"),
    "surrogate": ("\ud800", {}, "surrogate"),
}


@pytest.mark.parametrize(("prompt", "arguments", "error"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_requests(prompt, arguments, error):
    """One line, before any work, and both ways of asking."""
    model, backend = make("The quick brown fox")
    with pytest.raises(ValueError, match=error) as caught:
        model.stream(prompt, **arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=error):
        model.generate(prompt, **arguments)
    assert backend.requests == []


def test_a_bad_request_leaves_an_open_stream_alone():
    model, _ = make("The quick brown fox")
    stream = model.stream([1], max_new_tokens=3)
    first = next(stream)
    with pytest.raises(ValueError, match="prompt is empty"):
        model.generate("")
    assert [first.token_id, *[c.token_id for c in stream]] == TOKENIZER.encode("The quick brown")[
        :3
    ]


# Without a tokenizer.


def test_without_a_tokenizer_ids_work():
    backend = FakeBackend([5, 6, 7], vocab_size=VOCAB)
    model = MoeModel(backend, tiny_config(VOCAB))
    out = model.generate([1, 2], max_new_tokens=3)
    assert (out.text, out.token_ids) == ("", [5, 6, 7])
    for call in (
        lambda: model.generate("hi"),
        lambda: model.generate(CHAT),
        lambda: model.tokenizer,
        lambda: model.perplexity("hi there"),
    ):
        with pytest.raises(ValueError, match=r"no tokenizer\.json"):
            call()
    with pytest.raises(ValueError, match="stop needs a tokenizer"):
        model.generate([1], stop="x")


# Logits and perplexity.


def expected_nll(backend, ids, windows):
    """Mean over (start, first scored, end) windows, token by token in float64."""
    total, count = 0.0, 0
    for start, first, end in windows:
        logits = backend.logits(ids[start:end]).double()
        for t in range(first, end):
            row = logits[t - 1 - start]
            total += float(row.logsumexp(0) - row[ids[t]])
            count += 1
    return total / count


def test_perplexity_in_one_window():
    model, backend = make()
    ids = list(range(40, 90))
    expected = math.exp(expected_nll(backend, ids, [(0, 1, 50)]))
    assert model.perplexity(ids) == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_text():
    model, _ = make()
    text = "The quick brown fox"
    assert model.perplexity(text) == model.perplexity(TOKENIZER.encode(text))


@pytest.mark.parametrize("window", [10, None])
def test_perplexity_in_windows_scores_each_token_once(window):
    """Windows of 10 that move by 5; the context alone bounds them as well."""
    model, backend = make(max_context=10 if window is None else 256)
    ids = [(7 * i) % 400 for i in range(23)]
    windows = [(0, 1, 10), (5, 10, 15), (10, 15, 20), (15, 20, 23)]
    seen = []
    original = backend.logits
    backend.logits = lambda part: seen.append(list(part)) or original(part)
    value = model.perplexity(ids, window=window)
    assert seen == [ids[start:end] for start, _, end in windows]
    backend.logits = original
    assert value == pytest.approx(math.exp(expected_nll(backend, ids, windows)), rel=1e-5)


@pytest.mark.parametrize(
    ("ids", "arguments", "error"),
    [
        ([1], {}, "at least 2 tokens, got 1"),
        ([1, 2], {"window": 1}, "window must be a whole number, 2 to 256, got 1"),
        ([1, 2], {"window": 257}, "window must be a whole number, 2 to 256, got 257"),
    ],
)
def test_bad_perplexity(ids, arguments, error):
    model, _ = make()
    with pytest.raises(ValueError, match=error):
        model.perplexity(ids, **arguments)


def test_logits():
    model, backend = make()
    assert torch.equal(model.logits([3, 4, 5]), backend.logits([3, 4, 5]))
    assert model.logits([1] * 256).shape == (256, VOCAB)
    for ids, error in (([], "no token ids"), ([VOCAB], "token id 0"), ([1] * 257, "257 tokens")):
        with pytest.raises(ValueError, match=error):
            model.logits(ids)


# Timings.


def test_timings(monkeypatch):
    """Prefill 0.5 s, then 0.25 s a token; the stop token counts as decoded."""
    now = [100.0]
    monkeypatch.setattr("moe_runtime.generate.time.perf_counter", lambda: now[0])
    model, backend = make("The quick brown fox<|endoftext|>")
    play = backend.decode

    def timed(*args, **kwargs):
        for i, token in enumerate(play(*args, **kwargs)):
            now[0] += 0.25 if i else 0.5
            yield token

    backend.decode = timed
    backend.plan = SimpleNamespace(decode_bytes=lambda context: {"experts": 10, "cache": context})
    backend.read_bandwidth = 1000.0
    timings = model.generate([1] * 4).timings
    count = len(TOKENIZER.encode("The quick brown fox"))
    assert timings.prefill_s == 0.5
    assert timings.first_token_s == 0.5
    assert timings.decode_tokens_per_s == 4.0
    assert timings.bytes_per_token == 10 + 4 + count // 2
    assert timings.bandwidth_share == pytest.approx(timings.bytes_per_token * 4 / 1000)
    assert timings.load_s is None


def test_timings_that_cannot_be_known():
    model, _ = make("The quick brown fox")
    timings = model.generate([1], max_new_tokens=1).timings
    assert timings.decode_tokens_per_s is None
    assert timings.bandwidth_share is None
    cancelled = model.generate([1], stop_on=lambda: True).timings
    assert cancelled.prefill_s is None and cancelled.first_token_s is None


# Opening.


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """from_pretrained with the loaders and backends replaced; notes what they were called with."""
    calls = {}
    files = {"tokenizer.json": byte_level_json()}
    checkpoint = SimpleNamespace(
        config={"model_type": "gpt_oss"},
        generation_config={"eos_token_id": 3},
        layout="huggingface",
        file_text=files.get,
    )
    config = tiny_config(VOCAB)

    def resolve(name, **arguments):
        calls["resolve"] = (name, arguments)
        return tmp_path

    def create_backend(*args, **arguments):
        calls["create_backend"] = (args, arguments)
        return FakeBackend([4, 5, 3], vocab_size=VOCAB)

    found = SimpleNamespace(config=config, family=SimpleNamespace(chat_code=None))
    monkeypatch.setattr(model_module.hub, "resolve", resolve)
    monkeypatch.setattr(model_module, "open_folder", lambda folder: nullcontext(checkpoint))
    monkeypatch.setattr(model_module, "plan_model", lambda *args: found)
    monkeypatch.setattr(model_module, "create_backend", create_backend)
    return SimpleNamespace(calls=calls, files=files, checkpoint=checkpoint, config=config)


def test_from_pretrained(opened):
    model = MoeModel.from_pretrained(
        "owner/name", revision="v1", device="cpu", backend="reference", dtype="fp32",
        dense_format="fp8", max_context=64, local_files_only=True, progress=False,
    )  # fmt: skip
    name, arguments = opened.calls["resolve"]
    assert name == "owner/name"
    assert arguments["revision"] == "v1" and arguments["local_files_only"] is True
    assert "demo" in arguments["bundled"]
    args, arguments = opened.calls["create_backend"]
    assert args[0] is opened.checkpoint and args[1].config is opened.config
    times = arguments.pop("times")
    assert arguments == {
        "device": "cpu", "backend": "reference", "dtype": "fp32", "max_context": 64,
        "dense_format": "fp8", "activations": "exact", "progress": False,
    }  # fmt: skip
    assert model.start_times is times.seconds and model.start_times["open"] > 0
    out = model.generate([1])
    assert (out.token_ids, out.finish_reason) == ([4, 5], "stop")
    assert out.timings.load_s > 0
    assert model.config is opened.config and model.backend == "fake"


def test_a_wrong_tokenizer_is_found_before_the_weights_are_read(opened, monkeypatch):
    found = SimpleNamespace(config=tiny_config(100), family=SimpleNamespace(chat_code=None))
    monkeypatch.setattr(model_module, "plan_model", lambda *args: found)
    with pytest.raises(CheckpointError, match="does not match"):
        MoeModel.from_pretrained("owner/name")
    assert "create_backend" not in opened.calls


@pytest.mark.parametrize("value", [0, -5, 1.5, "4096", True])
def test_bad_max_context(opened, value):
    with pytest.raises(ValueError, match="max_context must be a whole number, 1 or more"):
        MoeModel.from_pretrained("owner/name", max_context=value)
    assert opened.calls == {}


def test_later_options_are_not_accepted_yet():
    with pytest.raises(TypeError, match="kv_format"):
        MoeModel.from_pretrained("demo", kv_format="fp8")
