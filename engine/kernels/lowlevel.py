"""What numba lacks for these kernels: raw pointers, an atomic counter, bfloat16, a vectorisable exp.

A kernel is a C function ``void entry(void *data)`` over an array of 64-bit words (integers, addresses, float64). Word 0
is the work counter: every thread of the team takes the next item until none is left. So scheduling is dynamic (a thread
that the system put aside holds nobody's work but its current item) and a kernel needs to know nothing about threads.
bfloat16 travels as uint16: `load` and `store` convert by the element type, so that one body serves both dtypes.
"""

import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numba
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

HAS_BFLOAT = bool(llvm.get_host_cpu_features().get("avx512bf16"))


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


F = TypeVar("F", bound=Callable[..., Any])

# Sums may be reordered (that is what lets them vectorise); NaN and infinity keep their meaning.
REASSOCIATE = {"reassoc", "contract", "nsz", "arcp"}


def _intrinsic(function: Any) -> Any:
    """numba's decorator, untyped: compiled code calls the result without the leading typing context."""
    return intrinsic(function)


def inlined(function: F) -> F:
    """Compile a function that is always inlined, with reorderable sums."""
    compiled: F = njit(function, fastmath=REASSOCIATE, forceinline=True, error_model="numpy")
    return compiled


def inlined_exact(function: F) -> F:
    """Compile a function that is always inlined; arithmetic in the written order (fused multiply-add allowed)."""
    compiled: F = njit(function, fastmath={"contract"}, forceinline=True, error_model="numpy")
    return compiled


def kernel(function: Callable[[Any], None]) -> int:
    """Compile ``function(data)`` to machine code and return its address. The code is kept for the process's life.

    Cached on disk in the user's cache folder; where that cannot be written it is compiled anew (a few seconds).
    """
    decorate: Any = cfunc
    options = {"fastmath": REASSOCIATE, "nogil": True, "error_model": "numpy"}
    folder = _cache_folder()
    settings: Any = numba.config
    before = settings.CACHE_DIR
    settings.CACHE_DIR = "" if folder is None else str(folder)
    try:
        compiled = decorate(types.void(types.voidptr), cache=folder is not None, **options)(function)
    finally:
        settings.CACHE_DIR = before
    _COMPILED.append(compiled)
    return int(compiled.address)


def _cache_folder() -> Path | None:
    """Folder of this version of the kernels: numba itself would not notice a change in a function that is inlined."""
    digest = blake2b(digest_size=8)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    try:
        folder = Path.home() / ".cache" / "tandem" / f"kernels-{digest.hexdigest()}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or not ours to write
        return None
    return folder if os.access(folder, os.W_OK) else None


_COMPILED: list[object] = []  # a cfunc frees its code when it is collected


@_intrinsic
def pointer(typingctx, address):  # type: ignore[no-untyped-def]  # numba's calling convention
    """Return the int64 `address` as a void pointer, for `numba.carray`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@_intrinsic
def take_item(typingctx, data):  # type: ignore[no-untyped-def]
    """Atomically return word 0 of `data` and add one to it."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        word = ir.IntType(64)
        counter = builder.bitcast(args[0], word.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(word, 1), "monotonic")

    return types.int64(types.voidptr), codegen


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Element pointer without numba's wrap-around of negative indices, which would keep loops from vectorising."""
    proxy: Any = cgutils.create_struct_proxy(array_type)  # type: ignore[no-untyped-call]
    return builder.gep(proxy(context, builder, array).data, [index])


def _widen(builder: Any, bits: Any) -> Any:
    word = ir.IntType(32)
    return builder.bitcast(builder.shl(builder.zext(bits, word), ir.Constant(word, 16)), ir.FloatType())


def _narrow(builder: Any, value: Any) -> Any:
    """float32 to bfloat16, round half to even; NaN stays NaN."""
    word, half = ir.IntType(32), ir.IntType(16)
    bits = builder.bitcast(value, word)
    odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
    rounded_up = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    top = builder.select(is_nan, ir.Constant(word, 0x7FC00000), rounded_up)
    return builder.trunc(builder.lshr(top, ir.Constant(word, 16)), half)


@_intrinsic
def peek(typingctx, array, index):  # type: ignore[no-untyped-def]
    """Return ``array[index]`` as it is, without bounds or wrap-around."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load(_address(context, builder, signature.args[0], *args))

    return array.dtype(array, types.int64), codegen


@_intrinsic
def poke(typingctx, array, index, value):  # type: ignore[no-untyped-def]
    """Set ``array[index]`` to a value of the array's own type."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store(args[2], _address(context, builder, signature.args[0], args[0], args[1]))
        return context.get_dummy_value()

    return types.void(array, types.int64, array.dtype), codegen


@_intrinsic
def load(typingctx, array, index):  # type: ignore[no-untyped-def]
    """Return ``array[index]`` of float32 or bfloat16 (uint16) elements as float32."""
    is_bf16 = array.dtype == types.uint16

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value = builder.load(_address(context, builder, signature.args[0], *args))
        return _widen(builder, value) if is_bf16 else value

    return types.float32(array, types.int64), codegen


@_intrinsic
def store(typingctx, array, index, value):  # type: ignore[no-untyped-def]
    """Set ``array[index]`` to a float32 value, rounded to the array's type."""
    is_bf16 = array.dtype == types.uint16

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        target = _address(context, builder, signature.args[0], args[0], args[1])
        if is_bf16 and HAS_BFLOAT:  # one instruction; loops with several of them stay scalar, so `rounded` has none
            builder.store(builder.bitcast(builder.fptrunc(args[2], BFloat()), ir.IntType(16)), target)
        else:
            builder.store(_narrow(builder, args[2]) if is_bf16 else args[2], target)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.float32), codegen


@_intrinsic
def rounded(typingctx, array, value):  # type: ignore[no-untyped-def]
    """Return a float32 value as it would be after a round trip through the array's element type."""
    is_bf16 = array.dtype == types.uint16

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _widen(builder, _narrow(builder, args[1])) if is_bf16 else args[1]

    return types.float32(array, types.float32), codegen


@_intrinsic
def _power_of_two(typingctx, shifted):  # type: ignore[no-untyped-def]
    """Return 2**n of `shifted` = n + 1.5 * 2**23, whose low bits are n: move them to where the exponent is."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        word = ir.IntType(32)
        exponent = builder.shl(builder.bitcast(args[0], word), ir.Constant(word, 23))
        return builder.bitcast(builder.add(exponent, ir.Constant(word, 0x3F800000)), ir.FloatType())

    return types.float32(types.float32), codegen


_LOG2_E = 1.44269504088896341
_ROUND = 1.5 * 2**23
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4


@inlined_exact
def exp(x: Any) -> Any:
    """Return e**x in float32, within 2 ulp; below -87 it is (almost) zero, above 88 it saturates.

    Branch-free, so that loops over it vectorise; a call to libm would not. Source: Cephes `expf`.
    """
    x = min(max(x, types.float32(-87.0)), types.float32(88.0))
    shifted = x * types.float32(_LOG2_E) + types.float32(_ROUND)  # so large that its last bit is worth one
    n = shifted - types.float32(_ROUND)
    r = x - n * types.float32(_LN2_HIGH)
    r = r - n * types.float32(_LN2_LOW)
    p = types.float32(1.9875691500e-4)
    p = p * r + types.float32(1.3981999507e-3)
    p = p * r + types.float32(8.3334519073e-3)
    p = p * r + types.float32(4.1665795894e-2)
    p = p * r + types.float32(1.6666665459e-1)
    p = p * r + types.float32(5.0000001201e-1)
    p = p * r * r + r + types.float32(1.0)
    return p * _power_of_two(shifted)
