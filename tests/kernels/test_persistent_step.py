"""The persistent step on a CPU against the twins of the step of several kernels."""

import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from kernels.persistent.launch import arguments
from kernels.persistent.sizes import PHASES
from kernels.persistent.watch import where_programs_stand
from kernels.reference import sampling
from kernels.sampling import make_state
from quant.formats import FP8_BLOCK128, FP8_BLOCK128_E8M0, FP8_ROW, MXFP8, NVFP4
from tests.kernels import gluon_on_cpu
from tests.kernels.gluon_on_cpu import Emulated, T, raw
from tests.oracles.step_model import TINY, expected_logits, step_model
from tests.tolerances import assert_close

late = {"program": -1}  # a program that reads what others wrote a while after it could


def hold():
    if gluon_on_cpu._place.program == late["program"]:
        time.sleep(0.05)


def handlers(modules):
    attend, exchange, multiply, stamps, step = modules

    def sums(ptrs, count):
        hold()
        while True:
            words = ptrs.memory[ptrs.at].copy()
            if (((words - raw(count)) & 255) == 0).all():
                return T(words)
            gluon_on_cpu._watch.pause()

    def tagged(ptrs, tags):
        hold()
        while True:
            words = ptrs.memory[ptrs.at].copy()
            if ((words >> 32) == raw(tags)).all():
                return T((words & 0xFFFFFFFF).astype(np.uint32).view(np.int32))
            gluon_on_cpu._watch.pause()

    def decode(words):
        w = raw(words).view(np.uint32)
        a = w & 0x9C9C9C9C
        b = ((w << 2) & 0x8C8C8C8C) | ((w >> 2) & 0x10101010)
        a, b = (np.ascontiguousarray(x).view(np.int8).reshape(*w.shape, 4) for x in (a, b))
        return tuple(T(part[..., q, :]) for q in range(4) for part in (a, b))

    def pairs(a, b):
        a, b = (raw(x).view(np.uint32) for x in (a, b))
        both = (a & 0xFFFF) | (b << 16), (a >> 16) | (b & 0xFFFF0000)
        return tuple(T(x.view(np.int32)) for x in both)

    def two(ptrs, ptrs2, count):
        return sums(ptrs, count), sums(ptrs2, count)

    def sums_if(ptrs, wanted, mask):
        hold()
        keep = raw(mask) != 0
        while True:
            words = np.where(keep, ptrs.memory[ptrs.at], 0)
            if (((words - raw(wanted)) & 255 == 0) | ~keep).all():
                return T(words)
            gluon_on_cpu._watch.pause()

    def tagged_if(ptrs, tags, mask):
        hold()
        keep = raw(mask) != 0
        while True:
            words = np.where(keep, ptrs.memory[ptrs.at], 0)
            if ((words >> 32 == raw(tags)) | ~keep).all():
                return T((words & 0xFFFFFFFF).astype(np.uint32).view(np.int32).astype(np.int64))
            gluon_on_cpu._watch.pause()

    def signed(ptrs, count):
        while True:
            word = ptrs.memory[ptrs.at].copy()
            if (int(word) - int(raw(count))) & 255 == 0:
                return T(word)
            gluon_on_cpu._watch.pause()

    def residual(n, first, last, last_counts, count, ptrs, sum_count, mask):
        hold()
        keep = raw(mask) != 0
        at = np.stack([first.at + 256 * i for i in range(n - 1)] + [last.at])
        while True:
            words = first.memory[at]
            more = np.where(keep, ptrs.memory[ptrs.at], 0)
            done = ((words - raw(count)) & 255 == 0).all()
            if done and (((more - raw(sum_count)) & 255 == 0) | ~keep).all():
                break
            gluon_on_cpu._watch.pause()
        values = (words >> 8).astype(np.float32)
        values[-1] *= raw(last_counts)
        return T((values**2).sum(0)), T(more)

    found = {
        exchange.SIGNED: signed,
        exchange.SUM_IF: sums_if,
        exchange.TAGGED_IF: tagged_if,
    }
    found[exchange._TWO] = two
    for n, polling in enumerate(exchange.RESIDUAL, 1):
        found[polling] = partial(residual, n)
    for name, handler in (("_SUMS_", sums), ("_TAGGED_", tagged)):
        for n in (2, 4):
            found[getattr(exchange, name + str(n))] = handler
    found[attend.PAIRS] = pairs
    found[multiply._DECODE] = decode
    found[step.SAME] = lambda x: x
    found[stamps.CLOCK] = lambda x: T(np.int64(time.monotonic_ns()))
    return found


@pytest.fixture(scope="module")
def kernel():
    emulated = Emulated({})
    module = emulated.load_module("kernels.persistent.step")
    emulated.inline_asm = handlers(
        [
            emulated.load_module(f"kernels.persistent.{name}")
            for name in ("attend", "exchange", "multiply", "stamps", "step")
        ]
    )
    return module.step_kernel


def request(position, vocabulary):
    state = make_state(vocabulary, 8, torch.device("cpu"))
    state.token.fill_(17)
    state.position.fill_(position)
    return state


def run(kernel, model, position, trace=None, cache=None, state=None):
    """Logits; with a state the next token is drawn too."""
    s, w = model.sizes, model.weights
    logits = torch.full((s.vocabulary,), float("nan"))
    cache = model.cache.clone() if cache is None else cache
    now = state or request(position, s.vocabulary)
    tensors = arguments(w, model.buffers, now, model.rope, cache, model.table, logits)
    descs = [gluon_on_cpu.descriptor(w.dense, n) for n in (128, 32)]
    descs += [gluon_on_cpu.descriptor(w.experts, n) for n in s.tiles.boxes]
    trace = None if trace is None else gluon_on_cpu.pointer(trace)
    args = (
        *(gluon_on_cpu.pointer(t) for t in tensors),
        *descs,
        trace,
        int(state is not None),
        s,
    )
    gluon_on_cpu.launch(kernel, s.programs, args)
    return logits


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_the_step_is_its_twins(kernel, fp8):
    model = step_model(fp8=fp8)
    for position in (5, 0, 300):
        actual = run(kernel, model, position)
        assert_close(actual, expected_logits(model, position), "decode_step")


@pytest.mark.parametrize("format", [NVFP4, MXFP8, FP8_ROW, FP8_BLOCK128, FP8_BLOCK128_E8M0])
def test_every_format_of_experts(kernel, format):
    """With two columns of tiles in both halves, whose scales differ, and rows left over."""
    sizes = replace(TINY, width=384, hidden=352, programs=25)
    model = step_model(sizes, fp8=True, experts_in=format)
    expected = expected_logits(model, 5)
    assert_close(run(kernel, model, 5), expected, "decode_step")
    scales = model.layers[0]["down"].scales
    scales.copy_((scales.float() * 1.1).to(scales.dtype) if scales.dtype.is_floating_point else 125)
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close(expected_logits(model, 5), expected, "decode_step")


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_several_columns_of_tiles(kernel, fp8):
    """Of every matrix, with parts left over; most logits, so that programs differ in blocks."""
    sizes = replace(TINY, width=704, hidden=352, heads=12, programs=25, vocabulary=1300)
    model = step_model(sizes, fp8=fp8)
    state = request(300, sizes.vocabulary)
    actual = run(kernel, model, None, state=state)
    assert_close(actual, expected_logits(model, 300), "decode_step")
    assert state.token == actual.argmax()


@pytest.mark.parametrize("position", [150, 151, 200, 201, 301, 500])
def test_a_longer_cache_is_split_among_more_programs(kernel, position):
    """One program, then two to four of a head's four; all four merge."""
    model = step_model(fp8=True)
    trace = torch.zeros(TINY.programs, len(PHASES) * TINY.layers + 1, 3, dtype=torch.int64)
    actual = run(kernel, model, position, trace)
    assert_close(actual, expected_logits(model, position), "decode_step")
    begun, ready, ended = trace[trace[..., 2] > 0].unbind(1)
    assert (begun <= ready).all() and (ready <= ended).all()


def test_layers_use_their_sums_in_turn(kernel):
    model = step_model(replace(TINY, layers=5), fp8=True)
    for _ in range(2):
        assert_close(run(kernel, model, 5), expected_logits(model, 5), "decode_step")


def test_tokens_one_after_the_other(kernel):
    """Rows that a step writes are what later steps read."""
    model, twin, lost = (step_model(fp8=True) for _ in range(3))
    for position in (5, 6, 7):
        expected = expected_logits(twin, position, keep=True)
        assert_close(run(kernel, model, position, cache=model.cache), expected, "decode_step")
        forgotten = run(kernel, lost, position)  # into a copy of the cache
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close(forgotten, expected, "decode_step")


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_the_token_is_drawn_as_the_samplers_do(kernel, temperature):
    """Two in a row: the second with the first one seen, and its noise that of another step."""
    model = step_model(fp8=True)
    state = request(5, model.sizes.vocabulary)
    state.settings.copy_(torch.tensor([temperature, 1.5, 0, 1, 0]))
    state.seed.fill_(-(2**40) + 12345)
    state.seen[::3] = 1
    for i in range(2):
        seen, step = state.seen.clone(), state.step.clone()
        logits = run(kernel, model, None, state=state)
        token, logprob = sampling.sample(logits, seen, state.settings, state.seed, step)
        assert state.history[i] == state.token == token
        assert float(state.logprobs[i]) == pytest.approx(logprob, abs=1e-5)
        assert (int(state.step), int(state.position)) == (i + 1, 6 + i)
        seen[token] = 1
        assert torch.equal(state.seen, seen)


def test_the_draw_takes_the_first_of_equal_tokens_and_no_nan(kernel):
    model = step_model(fp8=True)
    model.weights.head_scale.zero_()
    state = request(5, model.sizes.vocabulary)
    state.settings.copy_(torch.tensor([0.0, 1, 0, 1, 0]))
    run(kernel, model, None, state=state)
    assert state.token == 0
    model.weights.head_scale[:130] = float("nan")
    run(kernel, model, None, state=state)
    assert state.token == 130


@pytest.mark.parametrize("scale", ["qkv_scale", "moe_norms", "head_scale"])
def test_planted_errors_of_one_percent_are_caught(kernel, scale):
    model = step_model(fp8=True)
    expected = expected_logits(model, 300)
    getattr(model.weights, scale).mul_(1.01)
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close(run(kernel, model, 300), expected, "decode_step")


def test_logits_of_experts_need_what_attention_adds(kernel):
    """Rows of the router behind those of the output projection: twice as much, or nothing."""
    model = step_model(fp8=True)
    expected = expected_logits(model, 300)
    rows = model.weights.out_scale[:, model.sizes.out_blocks * 128 :]
    for factor in (2.0, 0.0):
        rows.mul_(factor)
        with pytest.raises(AssertionError, match="relative RMS"):
            assert_close(run(kernel, model, 300), expected, "decode_step")


def test_the_trace_has_the_times_of_every_phase(kernel):
    model = step_model(fp8=True)
    s = model.sizes
    trace = torch.zeros(s.programs, len(PHASES) * s.layers + 1, 3, dtype=torch.int64)
    run(kernel, model, 5, trace)
    did = trace[..., 2] > 0
    assert did[:, -1].all() and (trace[~did][:, 2] == 0).all()
    begun, ready, ended = trace[did].unbind(1)
    assert (begun > 0).all() and (begun <= ready).all() and (ready <= ended).all()
    by_phase = did[:, :-1].view(s.programs, s.layers, -1).sum(0)
    assert (by_phase == by_phase[0]).all()
    work = dict(zip(PHASES, by_phase[0].tolist(), strict=True))
    assert work["router"] == s.programs and work["attention"] == s.kv_heads
    assert work["experts gate_up"] == s.programs and work["experts down"] == s.top_k * 2
    # No program has what it waits for before those that it comes from had what they waited for.
    trace = trace[:, :-1].view(s.programs, s.layers, len(PHASES), 3)
    did = did[:, :-1].view(trace.shape[:3])
    first_ready = torch.where(did, trace[..., 1], 1 << 62).amin(0)
    last_ready = torch.where(did, trace[..., 1], 0).amax(0)
    assert (first_ready[:, PHASES.index("router")] > last_ready[:, PHASES.index("qkv")]).all()
    assert (first_ready[1:, 0] > last_ready[:-1, PHASES.index("experts gate_up")]).all()


@pytest.mark.parametrize("program", range(TINY.programs))
def test_a_late_program_stops_nobody(kernel, program, monkeypatch):
    """What it has yet to read must not change, however far others could go.

    With 12 heads, columns of the output projection need some programs' qkv tiles only; in the third
    layer, sums that the first used are used again.
    """
    monkeypatch.setattr(gluon_on_cpu, "DEADLINE_S", 20.0)
    monkeypatch.setitem(late, "program", program)
    model = step_model(replace(TINY, heads=12, layers=3), fp8=True)
    state = request(5, model.sizes.vocabulary)
    logits = run(kernel, model, None, state=state)
    assert_close(logits, expected_logits(model, 5), "decode_step")
    assert state.token == logits.argmax()


def test_a_hang_is_an_error_that_names_the_phase(kernel, monkeypatch):
    """A program keeps its contributions to itself from the middle of a layer on."""
    model = step_model(fp8=True)
    s = model.sizes
    names = PHASES * s.layers + ("head",)
    trace = torch.zeros(s.programs, len(names), 3, dtype=torch.int64)
    at = names.index("experts down")
    real = gluon_on_cpu.Emulated.atomic_add

    def skipped(gl, words, value, **kwargs):
        kept = gluon_on_cpu._place.program == 2 and trace[2, at, 1] != 0
        return real(gl, words, value * 0 if kept else value, **kwargs)

    monkeypatch.setattr(gluon_on_cpu, "DEADLINE_S", 5.0)
    monkeypatch.setattr(gluon_on_cpu.Emulated, "atomic_add", skipped)
    with pytest.raises(gluon_on_cpu.Failed):
        run(kernel, model, 5, trace)
    said = where_programs_stand(trace, names)
    assert "wait for what qkv of layer 1 reads" in said and said.startswith("of 9 programs ")
    assert where_programs_stand(torch.zeros_like(trace), names).endswith("9 have not begun")
