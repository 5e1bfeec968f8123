"""The persistent step on a CPU against the twins of the step of several kernels."""

import numpy as np
import pytest
import torch

from kernels.persistent.launch import arguments, padded_experts
from tests.kernels import gluon_on_cpu
from tests.kernels.gluon_on_cpu import Emulated, T, raw
from tests.oracles.step_model import expected_logits, step_model
from tests.tolerances import assert_close


def handlers(modules):
    exchange, multiply, step = modules

    def sums(ptrs, old, count):
        while True:
            words = ptrs.memory[ptrs.at].copy()
            if (((words - raw(old) - raw(count)) & 255) == 0).all():
                return T(words)
            gluon_on_cpu._watch.pause()

    def tagged(ptrs, tags):
        while True:
            words = ptrs.memory[ptrs.at].copy()
            if ((words >> 32) == raw(tags)).all():
                return T((words & 0xFFFFFFFF).astype(np.uint32).view(np.int32))
            gluon_on_cpu._watch.pause()

    def decode(words):
        w = raw(words).view(np.uint32)
        a = w & 0x9C9C9C9C
        b = ((w << 2) & 0x8C8C8C8C) | ((w >> 2) & 0x10101010)
        as_bytes = lambda x: np.ascontiguousarray(x).view(np.int8).reshape(*w.shape, 4)
        a, b = as_bytes(a), as_bytes(b)
        return tuple(T(part[..., q, :]) for q in range(4) for part in (a, b))

    def now(ptrs):
        gluon_on_cpu._watch.pause()
        return T(ptrs.memory[ptrs.at].copy())

    def two(ptrs, ptrs2, old, old2, count):
        return sums(ptrs, old, count), sums(ptrs2, old2, count)

    def sums_if(ptrs, wanted, mask):
        keep = raw(mask) != 0
        while True:
            words = np.where(keep, ptrs.memory[ptrs.at], 0)
            if (((words - raw(wanted)) & 255 == 0) | ~keep).all():
                return T(words)
            gluon_on_cpu._watch.pause()

    def tagged_if(ptrs, tags, mask):
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

    found = {exchange.SIGNED: signed, exchange.NOW: now, exchange.SUM_IF: sums_if, exchange.TAGGED_IF: tagged_if}
    found[exchange._TWO] = two
    for name, handler in (("_SUMS_", sums), ("_TAGGED_", tagged)):
        for n in (1, 2, 4):
            found[getattr(exchange, name + str(n))] = handler
    found[multiply._DECODE] = decode
    found[step.SAME] = lambda x: x
    return found


@pytest.fixture(scope="module")
def kernel():
    emulated = Emulated({})
    module = emulated.load_module("kernels.persistent.step")
    emulated.inline_asm = handlers(
        [
            emulated.load_module(f"kernels.persistent.{name}")
            for name in ("exchange", "multiply", "step")
        ]
    )
    return module.step_kernel


def run(kernel, model, position):
    s, w = model.sizes, model.weights
    logits = torch.full((s.vocabulary,), float("nan"))
    tensors = arguments(
        w, model.buffers, torch.tensor([17], dtype=torch.int32),
        torch.tensor([position], dtype=torch.int32), model.rope, model.cache.clone(), model.table, logits,
    )  # fmt: skip
    descs = [gluon_on_cpu.descriptor(w.dense, n) for n in (64, 16)]
    descs += [gluon_on_cpu.descriptor(w.experts, n) for n in (64, 16, 8)]
    args = (*(gluon_on_cpu.pointer(t) for t in tensors), *descs, None, s, padded_experts(s))
    gluon_on_cpu.launch(kernel, s.programs, args)
    return logits


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_the_step_is_its_twins(kernel, fp8):
    model = step_model(fp8=fp8)
    for position in (5, 0, 300):
        actual = run(kernel, model, position)
        assert_close(actual, expected_logits(model, position), "decode_step")
