"""Storage types on the CPU: float16 (viewed as uint16) and bfloat16 (as int16) in and out, and packing rows."""

from functools import cache

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, types
from numba.core import cgutils
from numba.core.extending import intrinsic

from s2o_cupy.backends._lanes import BYTES, Lanes, constant, inlined, store


def compute_type(storage):
    """float32 or float64: what numbers of a storage type are computed in."""
    return types.float64 if storage == types.float64 else types.float32


def _same_shape(template, element):
    """`element`, or a vector of it as long as `template`."""
    return ir.VectorType(element, template.count) if isinstance(template, ir.VectorType) else element


def _number(llvm_type, number):
    return constant(llvm_type, number) if isinstance(llvm_type, ir.VectorType) else ir.Constant(llvm_type, number)


def _widen(builder, storage, raw):
    """The numbers of a storage type in its compute type, exactly."""
    if storage not in (types.uint16, types.int16):
        return raw
    word, single = _same_shape(raw.type, ir.IntType(32)), _same_shape(raw.type, ir.FloatType())
    bits = builder.zext(raw, word)
    if storage == types.int16:
        return builder.bitcast(builder.shl(bits, _number(word, 16)), single)
    size = builder.shl(builder.and_(bits, _number(word, 0x7FFF)), _number(word, 13))
    value = builder.bitcast(builder.fmul(builder.bitcast(size, single), _number(single, 2.0**112)), word)
    special = builder.icmp_unsigned(">=", size, _number(word, 0x7C00 << 13))
    value = builder.or_(value, builder.select(special, _number(word, 0x7F800000), _number(word, 0)))
    sign = builder.shl(builder.and_(bits, _number(word, 0x8000)), _number(word, 16))
    return builder.bitcast(builder.or_(value, sign), single)


def _narrow(builder, storage, value):
    """The nearest number of a storage type, ties to even; too large is infinite, NaN stays NaN."""
    if storage not in (types.uint16, types.int16):
        return value
    single, word = value.type, _same_shape(value.type, ir.IntType(32))
    short = _same_shape(value.type, ir.IntType(16))

    def n(number):
        return _number(word, number)

    bits = builder.bitcast(value, word)
    if storage == types.int16:
        odd = builder.and_(builder.lshr(bits, n(16)), n(1))
        kept = builder.lshr(builder.add(bits, builder.add(odd, n(0x7FFF))), n(16))
        result = builder.select(builder.fcmp_unordered("uno", value, value), n(0x7FC0), kept)
        return builder.trunc(result, short)
    size = builder.and_(bits, n(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, n(13)), n(1))
    normal = builder.lshr(builder.add(size, builder.add(odd, n(0xFFF - (112 << 23)))), n(13))
    # One half's last bit weighs 2**-24, the least float16.
    small = builder.bitcast(builder.fadd(builder.bitcast(size, single), _number(single, 0.5)), word)
    small = builder.sub(small, n(0x3F000000))
    result = builder.select(builder.icmp_unsigned("<", size, n(0x38800000)), small, normal)
    large = builder.select(builder.icmp_unsigned(">", size, n(0x7F800000)), n(0x7E00), n(0x7C00))
    result = builder.select(builder.icmp_unsigned(">=", size, n(0x47800000)), large, result)
    sign = builder.and_(builder.lshr(bits, n(16)), n(0x8000))
    return builder.trunc(builder.or_(result, sign), short)


def _byte_address(context, builder, array_type, array, offset, element):
    is_pointer = isinstance(array_type, types.CPointer)
    data = array if is_pointer else context.make_array(array_type)(context, builder, array).data
    data = builder.bitcast(data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(data, [offset]), element.as_pointer())


@intrinsic
def fetch(typingctx, array, offset):
    """The number at a byte offset of an array of any layout, or of a pointer, in its compute type."""
    storage = array.dtype

    def codegen(context, builder, signature, args):
        element = context.get_data_type(storage)
        pointer = _byte_address(context, builder, signature.args[0], *args, element)
        return _widen(builder, storage, builder.load(pointer, align=1))

    return compute_type(storage)(array, types.int64), codegen


@intrinsic
def fetch_lanes(typingctx, array, offset):
    """`width` consecutive numbers at a byte offset of an array or a pointer, in their compute type."""
    storage = array.dtype
    lanes = Lanes(compute_type(storage))

    def codegen(context, builder, signature, args):
        element = ir.VectorType(context.get_data_type(storage), lanes.width)
        pointer = _byte_address(context, builder, signature.args[0], *args, element)
        return _widen(builder, storage, builder.load(pointer, align=1))

    return lanes(array, types.int64), codegen


@intrinsic
def put(typingctx, array, offset, value):
    """Write a number, or lanes of them, at a byte offset of an array of any layout, rounded to nearest."""
    storage, computed = array.dtype, compute_type(array.dtype)
    value = Lanes(computed) if isinstance(value, Lanes) else computed

    def codegen(context, builder, signature, args):
        result = _narrow(builder, storage, args[2])
        pointer = _byte_address(context, builder, signature.args[0], args[0], args[1], result.type)
        builder.store(result, pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, value), codegen


@intrinsic
def call_at(typingctx, address, x, numbers):
    """Call a compiled ``void(pointer to x's numbers, ...)`` at an address; a tuple gives the int64 or pointer rest."""

    def codegen(context, builder, signature, args):
        data = context.make_array(x)(context, builder, args[1]).data
        integers = cgutils.unpack_tuple(builder, args[2])
        function = ir.FunctionType(ir.VoidType(), [data.type] + [i.type for i in integers])
        builder.call(builder.inttoptr(args[0], function.as_pointer()), [data, *integers])
        return context.get_dummy_value()

    return types.void(address, x, numbers), codegen


def _pack_step(x, source, index, gathered, start, row_stride, stride, dim, itemsize, first, n, at, row):
    """See `pack_rows`; strides in bytes, `index` is read if `gathered`."""
    target, ids = carray(x, 1), carray(index, 1)
    step = BYTES // target.itemsize
    for i in range(first, first + n):
        offset = start + (np.int64(ids[i]) if gathered else i) * row_stride
        d = 0
        if stride == itemsize:
            while d + step <= dim:
                store(target, at + d, fetch_lanes(source, offset + d * stride))
                d += step
        while d < dim:
            target[at + d] = fetch(source, offset + d * stride)
            d += 1
        at += row


@inlined
def pack_rows(pack, array, b, h, index, first, n, x, at, row):
    """Rows first .. first + n of ``array[b, h]``, or those of ``index[first : first + n]`` if it is not empty.

    Written to x from `at` on, `row` numbers apart. `pack` is the address of the array's `pack_step`.
    """
    call_at(
        pack,
        x,
        (
            array.ctypes.data, index.ctypes.data, np.int64(index.size > 0), b * array.strides[0] + h * array.strides[1],
            array.strides[2], array.strides[3], array.shape[3], array.itemsize, first, n, at, row,
        ),
    )  # fmt: skip


@cache
def pack_step(storage):
    """Address of the compiled step that packs rows of a storage type."""
    computed = compute_type(from_dtype(storage))
    pointers = [types.CPointer(x) for x in (computed, from_dtype(storage), types.int32)]
    return cfunc(types.void(*pointers, *[types.int64] * 10), cache=True, error_model="numpy")(_pack_step)
