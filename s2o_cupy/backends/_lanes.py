"""SIMD lanes for the CPU kernels: a vector type for Numba, its arithmetic, exp2, a register-blocked product.

A `Lanes` value is 64 bytes of float32 or float64 in registers: one number for each of `width`
queries (or keys). LLVM cuts it to what the machine has. Nothing here assumes finite numbers.
"""

from functools import partial

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.extending import intrinsic, models, register_model

# One work item, and a function inside it: division by zero is IEEE's.
kernel = partial(njit, nogil=True, cache=True, error_model="numpy")
inner = partial(njit, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
# A call passed on: no function of its own.
inlined = partial(njit, inline="always")

BYTES = 64
# Rows of the product kept in registers: 6 x 64 bytes fill the 16 vector registers of AVX2 best.
ROWS = 6
# 2**x on [-1/2, 1/2], relative error 7e-9 (float32, degree 6) and 2e-17 (float64, degree 12).
_EXP2 = {types.float32: 6, types.float64: 12}


class Lanes(types.Type):
    """Numba type of a register of `width` numbers."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.width = BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        super().__init__(manager, lanes, _vector(lanes))


def _vector(lanes):
    return ir.VectorType(ir.FloatType() if lanes.dtype.bitwidth == 32 else ir.DoubleType(), lanes.width)


def _splat(builder, scalar, vector):
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def constant(vector, number):
    """`number` in every lane."""
    return ir.Constant(vector, [number] * vector.count)


def _address(context, builder, array_type, array, index):
    """Pointer to element `index` of a 1-D contiguous array; no bounds, no negative index."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _load(builder, pointer, vector, itemsize):
    return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=itemsize)


def _store(builder, value, pointer, itemsize):
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=itemsize)


@intrinsic
def lean(typingctx):
    """Compile the function that calls this for size: it only arranges work, and unrolling it takes seconds."""

    def codegen(context, builder, signature, args):
        builder.function.attributes.add("optsize")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def load(typingctx, array, index):
    """``array[index : index + width]``."""
    lanes = Lanes(array.dtype)

    def codegen(context, builder, signature, args):
        pointer = _address(context, builder, signature.args[0], *args)
        return _load(builder, pointer, _vector(lanes), array.dtype.bitwidth // 8)

    return lanes(array, types.int64), codegen


@intrinsic
def store(typingctx, array, index, value):
    """``array[index : index + width] = value``."""

    def codegen(context, builder, signature, args):
        pointer = _address(context, builder, signature.args[0], *args[:2])
        _store(builder, args[2], pointer, array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, value), codegen


@intrinsic
def spread(typingctx, array, index):
    """``array[index]`` in every lane."""
    lanes = Lanes(array.dtype)

    def codegen(context, builder, signature, args):
        pointer = _address(context, builder, signature.args[0], *args)
        return _splat(builder, builder.load(pointer), _vector(lanes))

    return lanes(array, types.int64), codegen


@intrinsic
def fill(typingctx, array, number):
    """The scalar `number` in every lane of the array's element type."""
    lanes = Lanes(array.dtype)

    def codegen(context, builder, signature, args):
        return _splat(builder, args[1], _vector(lanes))

    return lanes(array, array.dtype), codegen


@intrinsic
def lane_sum(typingctx, lanes):
    """The sum over the lanes, by halves."""

    def codegen(context, builder, signature, args):
        value, count = args[0], args[0].type.count
        while count > 1:
            count //= 2
            mask, nothing = ir.VectorType(ir.IntType(32), count), ir.Constant(value.type, ir.Undefined)
            picks = [ir.Constant(mask, list(range(at, at + count))) for at in (0, count)]
            halves = [builder.shuffle_vector(value, nothing, pick) for pick in picks]
            value = builder.fadd(*halves)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return lanes.dtype(lanes), codegen


# --- arithmetic ---------------------------------------------------------------------------------------
def _operation(arity, emit):
    """An intrinsic of `arity` lanes from `emit(builder, *values)`."""

    def type_of(lanes):
        def codegen(context, builder, signature, args):
            return emit(builder, *args)

        return lanes(*[lanes] * arity), codegen

    if arity == 1:
        return intrinsic(lambda typingctx, a: type_of(a))
    if arity == 2:
        return intrinsic(lambda typingctx, a, b: type_of(a))
    if arity == 3:
        return intrinsic(lambda typingctx, a, b, c: type_of(a))
    return intrinsic(lambda typingctx, a, b, c, d: type_of(a))


def _muladd(builder, a, b, c):
    """Fused where the machine fuses; never a library call."""
    name = f"llvm.fmuladd.v{a.type.count}f{32 if isinstance(a.type.element, ir.FloatType) else 64}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


def _exp2(builder, x):
    """2**x: below the normal range 0, NaN stays NaN; x must not be large and positive."""
    vector = x.type
    single = isinstance(vector.element, ir.FloatType)
    mantissa, bias, word = (23, 127, 32) if single else (52, 1023, 64)
    integer = ir.VectorType(ir.IntType(word), vector.count)
    # Adding 1.5 * 2**mantissa rounds x to an integer and leaves it, biased, in the low bits.
    magic = constant(vector, float(3 << (mantissa - 1)) + bias)
    rounded = builder.fadd(x, magic)
    part = builder.fsub(x, builder.fsub(rounded, magic))
    power = builder.shl(builder.bitcast(rounded, integer), constant(integer, mantissa))
    value = None
    for c in _exp2_coefficients(types.float32 if single else types.float64):
        c = constant(vector, c)
        value = c if value is None else _muladd(builder, value, part, c)
    value = builder.fmul(value, builder.bitcast(power, vector))
    tiny = builder.fcmp_ordered("<", x, constant(vector, float(1 - bias)))
    return builder.select(tiny, constant(vector, 0.0), value)


def _exp2_coefficients(dtype):
    """Highest power first: interpolation of 2**x at Chebyshev points of [-1/2, 1/2]."""
    degree = _EXP2[dtype]
    points = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1)) / 2
    c = np.linalg.solve(np.vander(points), np.exp2(points))
    return c.astype(np.float32 if dtype is types.float32 else np.float64).tolist()


add = _operation(2, lambda builder, a, b: builder.fadd(a, b))
subtract = _operation(2, lambda builder, a, b: builder.fsub(a, b))
divide = _operation(2, lambda builder, a, b: builder.fdiv(a, b))
multiply = _operation(2, lambda builder, a, b: builder.fmul(a, b))
muladd = _operation(3, _muladd)
exp2 = _operation(1, _exp2)
# Where an operand is NaN the second one: a running maximum in second place ignores NaN.
larger = _operation(2, lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
# c where a <= b, else d.
select_le = _operation(4, lambda builder, a, b, c, d: builder.select(builder.fcmp_ordered("<=", a, b), c, d))


# --- products -----------------------------------------------------------------------------------------
def _block(rows, fresh):
    """Intrinsic: c[r] = (fresh ? 0 : c[r] * alpha) + sum over i < steps of a[r, i] * b[i], r < rows.

    a[r, i] is ``a[a0 + r * a_row + i * a_step]``, b[i] the lanes at ``b0 + i * width``, c[r] those at
    ``c0 + r * width``, alpha those at ``alpha0``. The sums stay in registers.
    """

    @intrinsic
    def block(typingctx, a, a0, a_row, a_step, steps, b, b0, c, c0, alpha, alpha0):
        def codegen(context, builder, signature, args):
            a, a0, a_row, a_step, steps, b, b0, c, c0, alpha, alpha0 = args
            at = dict(zip(("a", "b", "c", "alpha"), (signature.args[i] for i in (0, 5, 7, 9)), strict=True))
            vector, size = _vector(Lanes(at["a"].dtype)), at["a"].dtype.bitwidth // 8
            width = ir.Constant(ir.IntType(64), vector.count)
            targets = [builder.add(c0, builder.mul(width, ir.Constant(ir.IntType(64), r))) for r in range(rows)]
            targets = [_address(context, builder, at["c"], c, t) for t in targets]
            if fresh:
                start = [constant(vector, 0.0)] * rows
            else:
                factor = _load(builder, _address(context, builder, at["alpha"], alpha, alpha0), vector, size)
                start = [builder.fmul(_load(builder, t, vector, size), factor) for t in targets]
            sums = [cgutils.alloca_once_value(builder, s) for s in start]
            with cgutils.for_range(builder, steps, intp=ir.IntType(64)) as loop:
                right = builder.add(b0, builder.mul(loop.index, width))
                right = _load(builder, _address(context, builder, at["b"], b, right), vector, size)
                left = builder.add(a0, builder.mul(loop.index, a_step))
                for r, total in enumerate(sums):
                    pointer = builder.add(left, builder.mul(a_row, ir.Constant(ir.IntType(64), r)))
                    pointer = _address(context, builder, at["a"], a, pointer)
                    number = _splat(builder, builder.load(pointer), vector)
                    builder.store(_muladd(builder, number, right, builder.load(total)), total)
            for total, target in zip(sums, targets, strict=True):
                _store(builder, builder.load(total), target, size)
            return context.get_dummy_value()

        i = types.int64
        return types.void(a, i, i, i, i, b, i, c, i, alpha, i), codegen

    return block


# c = a @ b and c = c * alpha + a @ b, ROWS rows at a time: pad operands to whole blocks.
product, product_onto = _block(ROWS, True), _block(ROWS, False)
# Four rows at a time, nearly as fast, for the ranking's 8, 16 or 32 rows.
product_4, product_onto_4 = _block(4, True), _block(4, False)
