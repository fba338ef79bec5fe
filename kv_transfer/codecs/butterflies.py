"""Hadamard butterflies of one row as vector instructions: what LLVM does not find in a loop by itself.

A numba intrinsic with a loop over rows for each power of two: load the row into vectors of 16 floats, do all stages in
registers, store it. Between vectors a stage is an addition and a subtraction; inside of a vector, at distance h, lane i
meets lane i ^ h: ``u + w`` where bit h of i is clear, ``u - w`` where it is set. LLVM lowers the vectors to whatever
the CPU has; the operations and their order are those of `reference` everywhere.
"""

# mypy: disable-error-code="import-untyped,no-untyped-call"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from core.compiled import compiled

_LANES = 16
LARGEST = 1024  # of a part; a head_dim has none larger


def _typed_and_emitted(
    typing_context: Any, flat: Any, num_rows: Any, width: Any, start: Any, size: Any, scale: Any
) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        _, num_rows, width, start, size, scale = arguments
        stop = builder.mul(num_rows, width)
        end = builder.append_basic_block("end")
        choice = builder.switch(size, end)
        for part in (1 << bit for bit in range(LARGEST.bit_length())):
            block = builder.append_basic_block(f"size{part}")
            choice.add_case(ir.Constant(size.type, part), block)
            builder.position_at_end(block)
            with cgutils.for_range_slice(builder, start, stop, width) as (at, _):
                _emit(builder, cgutils.gep_inbounds(builder, array.data, at), scale, part)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(flat, *[types.intp] * 4, types.float32), emit


_transform: Any = intrinsic(_typed_and_emitted)  # is called without the typing context, which numba gives


def _emit(builder: ir.IRBuilder, first: ir.Value, scale: ir.Value, size: int) -> None:
    lanes = min(size, _LANES)
    vector = ir.VectorType(ir.FloatType(), lanes)
    pointer = builder.bitcast(first, vector.as_pointer())
    places = [builder.gep(pointer, [ir.Constant(ir.IntType(64), idx)]) for idx in range(size // lanes)]
    loads = [builder.load(place) for place in places]
    for load in loads:
        load.align = 4
    values: list[ir.Value] = list(loads)
    distance = size // 2
    while distance >= lanes:
        step = distance // lanes
        for idx in range(len(values)):
            if idx & step == 0:
                u, w = values[idx], values[idx + step]
                values[idx], values[idx + step] = builder.fadd(u, w), builder.fsub(u, w)
        distance //= 2
    while distance:
        swap = _lanes([lane ^ distance for lane in range(lanes)])
        blend = _lanes([lane + lanes if lane & distance else lane for lane in range(lanes)])
        for idx, value in enumerate(values):
            other = builder.shuffle_vector(value, ir.Constant(vector, ir.Undefined), swap)
            values[idx] = builder.shuffle_vector(builder.fadd(value, other), builder.fsub(other, value), blend)
        distance //= 2
    spread = builder.insert_element(ir.Constant(vector, ir.Undefined), scale, ir.Constant(ir.IntType(32), 0))
    spread = builder.shuffle_vector(spread, ir.Constant(vector, ir.Undefined), _lanes([0] * lanes))
    for place, value in zip(places, values, strict=True):
        builder.store(builder.fmul(value, spread), place).align = 4


def _lanes(indices: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), indices)


@compiled
def rotate_rows(flat: Any, num_rows: int, width: int, start: int, size: int, scale: Any) -> None:
    """Transform channels [start, start + size) of each row of ``flat[num_rows * width]`` in place.

    `size` is a power of two up to `LARGEST`. Other sizes change nothing. One call for many rows:
    choosing the code of a size costs as much as a row.
    """
    _transform(flat, num_rows, width, start, size, scale)
