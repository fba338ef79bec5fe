"""A register-blocked product of small tiles, written as vector instructions.

Compilers do not keep a block of accumulators in registers by themselves; so the inner loop is emitted as LLVM vectors:
6 rows x 64 columns of float32 accumulators (24 registers of 512 bits), one row of `b` and one broadcast word of `a` per
step. A word is a float32, multiplied and added, or a pair of bfloat16, whose two products are added in float32 by one
instruction (AVX-512 BF16), which doubles the rate.
"""

from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.lowlevel import HAS_BFLOAT, BFloat

ROWS = 6
COLUMNS = 64
_LANES = 16
_FLOAT, _WORD = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, _LANES)


def can_multiply(dtype: str) -> bool:
    """Whether this machine has the instructions for tiles of `dtype`."""
    return HAS_BFLOAT if dtype == "bfloat16" else bool(llvm.get_host_cpu_features().get("avx512f"))


def _emit(builder: Any, args: Any, *, pairs: bool, accumulate: bool) -> None:
    """Emit ``out[6, 64] (+)= a[6, k] @ b[k, 64]`` over words; args: addresses and strides in words, see `multiply`."""
    out, out_stride, a, a_stride, b, b_stride, depth = args

    def at(base: Any, index: Any, pointee: Any) -> Any:
        address = builder.add(base, builder.shl(index, ir.Constant(_WORD, 2)))
        return builder.inttoptr(address, pointee.as_pointer())

    def row_of(stride: Any, row: int) -> Any:
        return builder.mul(stride, ir.Constant(_WORD, row))

    def column(index: Any, lanes: int) -> Any:
        return builder.add(index, ir.Constant(_WORD, lanes * _LANES))

    cells = [(row, lanes) for row in range(ROWS) for lanes in range(COLUMNS // _LANES)]
    targets = [at(out, column(row_of(out_stride, row), lanes), _VECTOR) for row, lanes in cells]
    zero = ir.Constant(_VECTOR, [0.0] * _LANES)
    initial = [_aligned(builder.load(target)) for target in targets] if accumulate else [zero] * len(cells)
    before = builder.block
    loop, after = builder.append_basic_block("tile.loop"), builder.append_basic_block("tile.end")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_WORD)
    step.add_incoming(ir.Constant(_WORD, 0), before)
    sums = []
    for value in initial:
        phi = builder.phi(_VECTOR)
        phi.add_incoming(value, before)
        sums.append(phi)
    b_row = builder.mul(step, b_stride)
    b_vectors = [_aligned(builder.load(at(b, column(b_row, i), _VECTOR))) for i in range(COLUMNS // _LANES)]
    updated = []
    for (row, lanes), total in zip(cells, sums, strict=True):
        if lanes == 0:
            scalar = _aligned(builder.load(at(a, builder.add(row_of(a_stride, row), step), _FLOAT)))
            single = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
            splat = builder.shuffle_vector(
                single,
                ir.Constant(_VECTOR, ir.Undefined),
                ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES),
            )
        updated.append(_multiply_add(builder, total, splat, b_vectors[lanes], pairs=pairs))
    following = builder.add(step, ir.Constant(_WORD, 1))
    step.add_incoming(following, loop)
    for phi, value in zip(sums, updated, strict=True):
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
    builder.position_at_end(after)
    for target, value in zip(targets, updated, strict=True):
        builder.store(value, target, align=4)


def _declare(builder: Any, signature: Any, name: str) -> Any:
    return cgutils.get_or_insert_function(builder.module, signature, name)  # type: ignore[no-untyped-call]


def _aligned(load: Any) -> Any:
    load.align = 4
    return load


def _multiply_add(builder: Any, total: Any, left: Any, right: Any, *, pairs: bool) -> Any:
    if not pairs:
        name, operand = "llvm.fma.v16f32", _VECTOR
        arguments = (left, right, total)
    else:
        name, operand = "llvm.x86.avx512bf16.dpbf16ps.512", ir.VectorType(BFloat(), 2 * _LANES)
        arguments = (total, builder.bitcast(left, operand), builder.bitcast(right, operand))
    signature = ir.FunctionType(_VECTOR, [argument.type for argument in arguments])
    function = _declare(builder, signature, name)
    return builder.call(function, arguments)


def _intrinsic(function: Any) -> Any:
    return intrinsic(function)


def _make(*, accumulate: bool) -> Any:
    @_intrinsic
    def multiply(typingctx, rows, out, out_stride, a, a_stride, b, b_stride, depth):  # type: ignore[no-untyped-def]
        pairs = rows.dtype == types.uint16

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            _emit(builder, args[1:], pairs=pairs, accumulate=accumulate)
            return context.get_dummy_value()

        return types.void(rows, *[types.int64] * 7), codegen

    return multiply


# (rows, out address, out stride, a address, a stride, b address, b stride, depth): strides and depth in 32-bit words;
# `rows` is any array of the element type (float32 or uint16), which decides what a word is.
multiply = _make(accumulate=False)
multiply_add = _make(accumulate=True)


@_intrinsic
def largest(typingctx, address):  # type: ignore[no-untyped-def]
    """Return the largest of the 64 float32 at `address`; NaNs are passed over."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        row = builder.inttoptr(args[0], _VECTOR.as_pointer())
        parts = []
        for i in range(COLUMNS // _LANES):
            parts.append(_aligned(builder.load(builder.gep(row, [ir.Constant(_WORD, i)]))))
        pairwise = ir.FunctionType(_VECTOR, [_VECTOR, _VECTOR])
        maximum = _declare(builder, pairwise, "llvm.maxnum.v16f32")
        while len(parts) > 1:
            parts = [builder.call(maximum, parts[i : i + 2]) for i in range(0, len(parts), 2)]
        across = ir.FunctionType(_FLOAT, [_VECTOR])
        reduce = _declare(builder, across, "llvm.vector.reduce.fmax.v16f32")
        return builder.call(reduce, parts)

    return types.float32(types.int64), codegen
