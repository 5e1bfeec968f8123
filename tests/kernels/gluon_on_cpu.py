"""Gluon kernels run on a CPU: for checking the logic of kernels that Triton cannot interpret.

A kernel's module is loaded again with stand-ins for Triton and Gluon: tensors are numpy arrays,
layouts mean nothing but for shared memory that the tensor core or the copy engine reads, every
partition of every program is a thread. Barriers, copies, sums in memory and polling do what they do
on a GPU, in whatever order the threads come; warps, registers and speed are not there. Inline PTX
is replaced by the Python function given for it.
"""

from __future__ import annotations

import builtins
import threading
import time
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120.0

F8, BF16 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)
TYPES = {
    "int1": np.bool_, "int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64,
    "uint8": np.uint8, "uint32": np.uint32, "uint64": np.uint64, "float32": np.float32,
    "bfloat16": BF16, "float8e4nv": F8,
}  # fmt: skip
_memory = threading.RLock()  # makes atomics atomic


class Failed(Exception):
    """Another thread has failed, or all of them wait for ever."""


class Watch:
    """Ends waiting when a thread has failed or nothing has happened for long."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.deadline = time.monotonic() + DEADLINE_S

    def pause(self) -> None:
        if self.error is not None or time.monotonic() > self.deadline:
            raise Failed(f"waited for ever: {threading.current_thread().name}")
        time.sleep(0)


_watch = Watch()
_place = threading.local()  # .program, .programs of a thread


def raw(x: Any) -> Any:
    return x.a if isinstance(x, T) else x


class T:
    """A tensor or a scalar."""

    def __init__(self, a: Any) -> None:
        self.a = np.asarray(a)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.a.shape

    @property
    def dtype(self) -> np.dtype:
        return self.a.dtype

    def to(self, dtype: Any, bitcast: bool = False) -> T:
        dtype = np.dtype(dtype)
        if bitcast:
            return T(np.ascontiguousarray(self.a).view(dtype).reshape(self.a.shape))
        if self.a.dtype.kind == "f" and dtype.kind == "i":
            return T(np.trunc(self.a).astype(dtype))
        return T(self.a.astype(dtype))

    def permute(self, order: list[int]) -> T:
        return T(self.a.transpose(order))

    def reshape(self, shape: list[int]) -> T:
        return T(self.a.reshape([int(raw(n)) for n in shape]))

    def __getitem__(self, key: Any) -> T:
        return T(self.a[key])

    def __bool__(self) -> bool:
        return bool(self.a)

    def __index__(self) -> int:
        return int(self.a)

    def __neg__(self) -> T:
        return T(-self.a)

    def __invert__(self) -> T:
        return T(~self.a)


class Count(int):
    """A loop's number: a scalar that can be cast."""

    def __add__(self, other: Any) -> Any:
        return Count(int(self) + other) if isinstance(other, int) else T(np.int32(self)) + other

    def __mul__(self, other: Any) -> Any:
        return Count(int(self) * other) if isinstance(other, int) else T(np.int32(self)) * other

    def to(self, dtype: Any) -> T:
        return T(np.dtype(dtype).type(self))


def _operator(name: str) -> None:
    def forward(self: T, other: Any) -> T:
        other = raw(other)
        with np.errstate(all="ignore"):
            if name == "__truediv__" and self.a.dtype.kind == "i":
                return T(np.float32(self.a) / np.float32(other))
            return T(getattr(np.ndarray, name)(self.a, np.asarray(other)
                     if isinstance(other, np.ndarray) else other))  # fmt: skip

    setattr(T, name, forward)
    reverse = "__r" + name[2:]

    def backward(self: T, other: Any) -> T:
        with np.errstate(all="ignore"):
            return T(getattr(np.ndarray, reverse)(self.a, other))

    if hasattr(np.ndarray, reverse):
        setattr(T, reverse, backward)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor", "lshift",
              "rshift", "lt", "le", "gt", "ge", "eq", "ne"):  # fmt: skip
    _operator(f"__{_name}__")
T.__hash__ = None  # type: ignore[assignment]


class Pointer:
    """Addresses in one buffer."""

    def __init__(self, memory: np.ndarray, at: Any = 0) -> None:
        self.memory, self.at = memory, np.asarray(at, dtype=np.int64)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.at + raw(other))

    def to(self, dtype: Any, bitcast: bool = False) -> Any:
        if isinstance(dtype, PointerType):
            size, wanted = self.memory.itemsize, dtype.of.itemsize
            assert bitcast and (self.at * size % wanted == 0).all()
            whole = self.memory[: len(self.memory) * size // wanted * wanted // size]
            return Pointer(whole.view(dtype.of), self.at * size // wanted)
        return T(self.at.astype(dtype))


class PointerType:
    """What a pointer can be cast to."""

    def __init__(self, of: Any) -> None:
        self.of = np.dtype(of)


class Shared:
    """Shared memory: bytes, seen as [.., rows, columns] of a type, swizzled or not."""

    def __init__(self, data: np.ndarray, dtype: Any, shape: list[int], layout: Any) -> None:
        self.data, self.dtype = data, np.dtype(dtype)
        self.shape, self.layout = tuple(int(raw(n)) for n in shape), layout
        self.transposed = False
        self.places: np.ndarray | None = None  # of a part that is not in one piece

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        part = [builtins.slice(None)] * len(self.shape)
        part[dim] = builtins.slice(start, start + length)
        places = self._places()[tuple(part)]
        seen = Shared(self.data, self.dtype, list(places.shape), self.layout)
        seen.places = places
        return seen

    def index(self, i: Any) -> Shared:
        i = int(raw(i))
        assert 0 <= i < self.shape[0], (i, self.shape)
        size = self.data.size // self.shape[0]
        return Shared(self.data[i * size : (i + 1) * size], self.dtype, self.shape[1:], self.layout)

    def reinterpret(
        self, dtype: Any, shape: list[int], layout: Any, _semantic: Any = None
    ) -> Shared:
        seen = Shared(self.data, dtype, shape, layout)
        assert np.prod(seen.shape) * seen.dtype.itemsize <= self.data.size, (shape, self.shape)
        return Shared(
            self.data[: int(np.prod(seen.shape)) * seen.dtype.itemsize], dtype, shape, layout
        )

    def permute(self, order: list[int]) -> Shared:
        assert order == [1, 0]
        seen = Shared(self.data, self.dtype, self.shape, self.layout)
        seen.transposed = not self.transposed
        return seen

    def _places(self) -> np.ndarray:
        """Byte offsets of the elements."""
        if self.places is not None:
            return self.places
        flat = np.arange(int(np.prod(self.shape))).reshape(self.shape) * self.dtype.itemsize
        if getattr(self.layout, "swizzle", 0) == 32:
            assert self.shape[-1] * self.dtype.itemsize == 32
            flat = flat ^ (((flat >> 7) & 1) << 4)  # bit 4 of an address with bit 7
        return flat

    def load(self, layout: Any) -> T:
        flat = self.data.view(self.dtype)
        value = flat[self._places() // self.dtype.itemsize]
        return T(value.T.copy() if self.transposed else value.copy())

    def store(self, value: T) -> None:
        assert value.shape == self.shape, (value.shape, self.shape)
        flat = self.data.view(self.dtype)
        flat[self._places() // self.dtype.itemsize] = value.a.astype(self.dtype)


class Barrier(Shared):
    """Shared memory whose words are barriers."""

    def __init__(self, words: list[dict[str, int]]) -> None:
        self.words = words

    def index(self, i: Any) -> Barrier:
        i = int(raw(i))
        assert 0 <= i < len(self.words)
        return Barrier(self.words[i : i + 1])

    def change(self, arrivals: int = 0, expected: int = 0) -> None:
        with _memory:
            word = self.words[0]
            word["pending"] -= arrivals
            word["bytes"] += expected
            assert word["pending"] >= 0
            if word["pending"] == 0 and word["bytes"] == 0:
                word["phase"] += 1
                word["pending"] = word["count"]


class Descriptor:
    """What the copy engine reads: rows of bytes or numbers."""

    def __init__(self, rows: np.ndarray, box: list[int]) -> None:
        self.rows, self.box = rows, box


class Layout:
    """Any layout; only the swizzle of shared memory is kept."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.swizzle = 0


class NVMMASharedLayout(Layout):
    def __init__(self, swizzle_byte_width: int, element_bitwidth: int, rank: int = 2) -> None:
        self.swizzle = swizzle_byte_width


class _MBarrier(types.SimpleNamespace):
    class MBarrierLayout(Layout):
        pass

    @staticmethod
    def init(bar: Barrier, count: int) -> None:
        bar.words[0].update(count=count, pending=count, bytes=0, phase=0)

    @staticmethod
    def expect(bar: Barrier, size: int, pred: Any = True) -> None:
        if pred:
            bar.change(arrivals=1, expected=size)

    @staticmethod
    def arrive(bar: Barrier, count: int = 1, pred: Any = True) -> None:
        if pred:
            bar.change(arrivals=count)

    @staticmethod
    def wait(bar: Barrier, phase: Any, **kwargs: Any) -> None:
        while bar.words[0]["phase"] & 1 == int(raw(phase)) & 1:
            _watch.pause()


class _Tma(types.SimpleNamespace):
    @staticmethod
    def async_copy_global_to_shared(
        desc: Descriptor, at: list[Any], bar: Barrier, out: Shared, pred: bool = True
    ) -> None:
        row, column = (int(raw(i)) for i in at)
        data = np.zeros(desc.box, desc.rows.dtype)  # zeros outside
        found = desc.rows[row : row + desc.box[0], column : column + desc.box[1]]
        data[: found.shape[0], : found.shape[1]] = found
        out.data[:] = data.reshape(-1).view(np.uint8)
        bar.change(expected=-data.nbytes)


def _matrix(x: Any) -> np.ndarray:
    return (x.load(None) if isinstance(x, Shared) else x).a.astype(np.float64)


def warpgroup_mma(a: Any, b: Any, acc: T, *, use_acc: bool = True, **kwargs: Any) -> T:
    product = _matrix(a) @ _matrix(b)
    return T((product + acc.a if use_acc else product).astype(np.float32))


def mma_v2(a: T, b: T, acc: T) -> T:
    return warpgroup_mma(a, b, acc)


class Emulated:
    """The stand-in for gluon.language, and for all else that kernels import from Triton."""

    def __init__(self, inline_asm: dict[str, Any]) -> None:
        self.inline_asm = inline_asm  # PTX -> function(*tensors) -> tensor or tensors
        self.modules: dict[str, types.ModuleType] = {}
        for name, dtype in TYPES.items():
            setattr(self, name, dtype)
        for name in (
            "BlockedLayout", "DistributedLinearLayout", "SliceLayout", "DotOperandLayout",
            "NVMMADistributedLayout", "SwizzledSharedLayout",
        ):  # fmt: skip
            setattr(self, name, Layout)
        self.NVMMASharedLayout = NVMMASharedLayout
        self.pointer_type = PointerType
        self.barrier = lambda: None

    # --- language
    @staticmethod
    def constexpr(value: Any) -> Any:
        return value

    @staticmethod
    def program_id(axis: int) -> T:
        return T(np.int32(_place.program))

    static_range = staticmethod(range)

    @staticmethod
    def arange(first: int, last: int, layout: Any = None) -> T:
        return T(np.arange(first, last, dtype=np.int32))

    @staticmethod
    def full(shape: list[int], value: Any, dtype: Any, layout: Any = None) -> T:
        return T(np.full([int(n) for n in shape], raw(value), dtype))

    def zeros(self, shape: list[int], dtype: Any, layout: Any = None) -> T:
        return self.full(shape, 0, dtype)

    @staticmethod
    def zeros_like(x: T) -> T:
        return T(np.zeros_like(x.a))

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> T:
        a, b = raw(a), raw(b)
        arrays = [x for x in (a, b) if isinstance(x, np.ndarray)]
        plain = np.int32 if isinstance(a, int) and isinstance(b, int) else np.float32
        dtype = np.result_type(*arrays) if arrays else plain
        return T(np.where(raw(condition), np.asarray(a, dtype), np.asarray(b, dtype)))

    @staticmethod
    def _binary(function: Any, a: Any, b: Any) -> T:
        a, b = raw(a), raw(b)
        if isinstance(a, np.ndarray) and not isinstance(b, np.ndarray):
            b = np.asarray(b, a.dtype)
        elif isinstance(b, np.ndarray) and not isinstance(a, np.ndarray):
            a = np.asarray(a, b.dtype)
        return T(function(a, b))

    def maximum(self, a: Any, b: Any) -> T:
        return self._binary(np.maximum, a, b)

    def minimum(self, a: Any, b: Any) -> T:
        return self._binary(np.minimum, a, b)

    @staticmethod
    def cdiv(a: Any, b: Any) -> T:
        return T(-(-np.asarray(raw(a)) // raw(b)))

    @staticmethod
    def _unary(function: Any) -> Any:
        def apply(x: Any) -> T:
            with np.errstate(all="ignore"):
                return T(np.asarray(function(np.asarray(raw(x), np.float32)), np.float32))

        return apply

    def __getattr__(self, name: str) -> Any:
        unary = {
            "exp": np.exp, "exp2": np.exp2, "log": np.log, "abs": np.abs, "sqrt": np.sqrt,
            "floor": np.floor, "rsqrt": lambda x: 1 / np.sqrt(x),
        }  # fmt: skip
        if name in unary:
            return self._unary(unary[name])
        raise AttributeError(name)

    @staticmethod
    def max(x: T, axis: int = 0) -> T:
        return T(x.a.max(axis))

    @staticmethod
    def min(x: T, axis: int = 0) -> T:
        return T(x.a.min(axis))

    @staticmethod
    def sum(x: T, axis: int = 0) -> T:
        return T(x.a.sum(axis, dtype=x.a.dtype))

    @staticmethod
    def join(a: T, b: T) -> T:
        return T(np.stack([a.a, b.a], -1))

    @staticmethod
    def split(x: T) -> tuple[T, T]:
        assert x.shape[-1] == 2
        return T(x.a[..., 0]), T(x.a[..., 1])

    @staticmethod
    def broadcast(a: T, b: T) -> tuple[T, ...]:
        return tuple(T(x.copy()) for x in np.broadcast_arrays(a.a, b.a))

    @staticmethod
    def convert_layout(x: T, layout: Any, assert_trivial: bool = False) -> T:
        return x

    # --- memory
    @staticmethod
    def load(ptr: Pointer, mask: Any = None, other: Any = 0, **kwargs: Any) -> T:
        at = ptr.at
        if mask is None:
            assert (at >= 0).all() and (at < len(ptr.memory)).all(), "load outside of the buffer"
            return T(ptr.memory[at].copy())
        mask = np.broadcast_to(raw(mask), at.shape)
        inside = at[mask]
        assert (inside >= 0).all() and (inside < len(ptr.memory)).all(), "load outside"
        out = np.array(np.broadcast_to(raw(other), at.shape), ptr.memory.dtype)
        out[mask] = ptr.memory[inside]
        return T(out)

    @staticmethod
    def _write(ptr: Pointer, value: Any, mask: Any, add: bool) -> T:
        """Returns what was there before, where not masked."""
        at = ptr.at
        value = np.broadcast_to(np.asarray(raw(value)), at.shape)
        if mask is not None:
            keep = np.broadcast_to(raw(mask), at.shape)
            at, value = at[keep], value[keep]
        assert (at >= 0).all() and (at < len(ptr.memory)).all(), "store outside of the buffer"
        with _memory:
            before = ptr.memory[np.clip(ptr.at, 0, len(ptr.memory) - 1)]
            if add:
                np.add.at(ptr.memory, at, value.astype(ptr.memory.dtype))
            else:
                ptr.memory[at] = value.astype(ptr.memory.dtype)
        return T(before)

    def store(self, ptr: Pointer, value: Any, mask: Any = None, **kwargs: Any) -> None:
        self._write(ptr, value, mask, add=False)

    def atomic_add(self, ptr: Pointer, value: Any, mask: Any = None, **kwargs: Any) -> T:
        return self._write(ptr, value, mask, add=True)

    def inline_asm_elementwise(
        self, asm: str, constraints: str, args: list[Any], **kwargs: Any
    ) -> Any:
        return self.inline_asm[asm](*args)

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        if isinstance(layout, _MBarrier.MBarrierLayout):
            return Barrier([{} for _ in range(shape[0])])
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        # What nobody has written is NaN in every float type.
        return Shared(np.full(size, 0xFF, np.uint8), dtype, shape, layout)

    # --- partitions
    @staticmethod
    def warp_specialize(partitions: list[Any], warps: list[int], registers: list[int]) -> None:
        place = (_place.program, _place.programs)

        def body(function: Any, args: tuple[Any, ...]) -> None:
            _place.program, _place.programs = place
            try:
                function(*args)
            except BaseException as error:
                _watch.error = _watch.error or error

        threads = [
            threading.Thread(
                target=body, args=part, name=f"{part[0].__name__} of {place[0]}", daemon=True
            )
            for part in partitions
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    # --- loading kernels
    def load_module(self, name: str) -> types.ModuleType:
        """A module of this repository with stand-ins for Triton."""
        if name in self.modules:
            return self.modules[name]
        path = ROOT / (name.replace(".", "/") + ".py")
        module = types.ModuleType(name)
        self.modules[name] = module
        hopper = types.SimpleNamespace(
            warpgroup_mma=warpgroup_mma,
            warpgroup_mma_wait=lambda n, deps: deps[0] if len(deps) == 1 else tuple(deps),
            fence_async_shared=lambda: None,
            mbarrier=_MBarrier,
            tma=_Tma,
        )
        stand_ins = {
            "triton": types.SimpleNamespace(),
            "triton.experimental": types.SimpleNamespace(gluon=types.SimpleNamespace(jit=_jit)),
            "triton.experimental.gluon": types.SimpleNamespace(language=self, jit=_jit),
            "triton.experimental.gluon.language._core": types.SimpleNamespace(builtin=lambda f: f),
            "triton.experimental.gluon.language.nvidia.ampere": types.SimpleNamespace(
                mma_v2=mma_v2
            ),
            "triton.experimental.gluon.language.nvidia.hopper": hopper,
        }

        def imported(
            what: str, scope: Any = None, local: Any = None, fromlist: Any = (), level: int = 0
        ) -> Any:
            if what in stand_ins:
                return stand_ins[what]
            if what.startswith(("kernels.persistent.", "kernels.tile_gemm.")):
                return self.load_module(what)
            return builtins.__import__(what, scope, local, fromlist, level)

        def counted(*args: Any) -> Any:
            return (Count(i) for i in builtins.range(*(int(raw(a)) for a in args)))

        scope = dict(vars(builtins), __import__=imported, range=counted)
        module.__dict__["__builtins__"] = scope
        source = path.read_text()
        exec(compile(source, str(path), "exec"), module.__dict__)
        return module


def _jit(function: Any = None, **options: Any) -> Any:
    return function or (lambda f: f)


def pointer(tensor: torch.Tensor) -> Pointer:
    """A tensor on the CPU as a kernel's argument, sharing its memory."""
    flat = tensor.view(-1)
    if tensor.dtype == torch.bfloat16:
        return Pointer(flat.view(torch.int16).numpy().view(BF16))
    return Pointer(flat.numpy())


def descriptor(tensor: torch.Tensor, height: int) -> Descriptor:
    """Bytes of a tensor in rows of 256, of which `height` are copied at once."""
    return Descriptor(tensor.view(torch.uint8).view(-1, 256).numpy(), [height, 256])


def matrix_descriptor(matrix: torch.Tensor, box: list[int]) -> Descriptor:
    """A matrix of bf16 of which boxes are copied."""
    return Descriptor(matrix.view(torch.int16).numpy().view(BF16), box)


def launch(kernel: Any, programs: int, args: tuple[Any, ...]) -> None:
    """Run a kernel's programs side by side. Raises what one of them raised."""
    global _watch
    _watch = Watch()

    def body(program: int) -> None:
        _place.program, _place.programs = program, programs
        try:
            kernel(*args)
        except BaseException as error:
            _watch.error = _watch.error or error

    threads = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(programs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if _watch.error is not None:
        raise _watch.error
