"""What numba compiles: handlers of XLA's foreign-function interface, and the rows they go over.

All of it is in this file, for numba's cache on disk looks at the file of the handler alone. From
the top: memory and XLA by their addresses; tasks, of which none waits; the sums and the rows.

Sums are vectors only where their order is free, `reassoc`. The subtractions that take the mean in
two parts must never be free, else LLVM may fold them into one: `_minus` is a function of its own.
"""

# pyright: reportCallIssue=false
# (It does not know that numba calls an intrinsic without its typing context.)

import inspect

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic


def _jitted(*fastmath):
    """The function itself, which a type checker's import hook may have wrapped."""
    jit = numba.njit(error_model="numpy", fastmath={*fastmath} or False)
    return lambda function: jit(inspect.unwrap(function))


_elements, _sums, _control = _jitted("contract"), _jitted("reassoc", "contract"), _jitted()

# ---- Memory, by addresses. A pointer's type says how its numbers are stored: as uint16 those of
# bfloat16, as int16 those of float16, for numba knows neither. All are read as float32.

_WORD, _BYTES = ir.IntType(64), ir.IntType(8).as_pointer()
_DIRECTIONS = "forward", "backward"
_DTYPES = "float32", "float64", "bfloat16", "float16"
_STORED = types.float32, types.float64, types.uint16, types.int16


def _wide(stored):
    return stored if isinstance(stored, types.Float) else types.float32


def _instruction(restype, *argtypes):
    """An intrinsic of one signature, from the function that builds it."""

    def make(build):
        def typed(typingctx, *args):
            return restype(*argtypes), lambda context, builder, sig, args: build(builder, *args)

        typed.__name__ = build.__name__
        typed.__signature__ = inspect.signature(build)  # numba counts the arguments.
        return intrinsic(typed)

    return make


def _at(builder, address, kind: ir.Type = _WORD):
    return builder.inttoptr(address, kind.as_pointer())


@_instruction(types.intp, types.intp)
def _word(builder, address):
    return builder.load(_at(builder, address))


@_instruction(types.void, types.intp, types.intp)
def _set_word(builder, address, value):
    builder.store(value, _at(builder, address))


@_instruction(types.float64, types.intp)
def _real(builder, address):
    return builder.load(_at(builder, address, ir.DoubleType()))


@_instruction(types.void, types.intp, types.float64)
def _set_real(builder, address, value):
    builder.store(value, _at(builder, address, ir.DoubleType()))


@_instruction(types.intp, types.intp, types.intp)
def _fetch_add(builder, address, value):
    """Also reads, of 0, what another thread wrote."""
    return builder.atomic_rmw("add", _at(builder, address), value, "acq_rel")


@_instruction(types.intp, types.intp, types.intp)
def _quotient(builder, a, b):
    """Of numbers that are not below 0. (Python's takes numba a tenth of a second to compile.)"""
    return builder.udiv(a, b)


@_instruction(types.intp, types.intp, types.intp)
def _remainder(builder, a, b):
    return builder.urem(a, b)


@_instruction(types.intp, types.intp, types.intp)
def _call(builder, function, argument):
    kind = ir.FunctionType(_WORD, [_WORD])
    return builder.call(builder.inttoptr(function, kind.as_pointer()), [argument])


def _c_function(builder, name, restype, *args):
    kind = ir.FunctionType(restype, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


@_instruction(types.intp, types.intp)
def _allocate(builder, size):
    """0 if there is no memory. (Python's own, because it is there on every platform.)"""
    return builder.ptrtoint(_c_function(builder, "PyMem_RawMalloc", _BYTES, size), _WORD)


@_instruction(types.void, types.intp)
def _release(builder, address):
    _c_function(builder, "PyMem_RawFree", ir.VoidType(), builder.inttoptr(address, _BYTES))


@_instruction(types.intp, types.intp)
def _arguments(builder, size):
    """A structure on the stack, of XLA's: its size, no extension, and six words to fill in."""
    space = cgutils.alloca_once(builder, ir.ArrayType(_WORD, 8))
    address = builder.ptrtoint(space, _WORD)
    for at, value in ((0, size), (8, ir.Constant(_WORD, 0))):
        place = builder.add(address, ir.Constant(_WORD, at))
        builder.store(value, _at(builder, place))
    return address


@_instruction(types.intp, types.intp, types.intp)
def _plan(builder, job, what):
    """A number of the plan, which is copied behind the head of a job."""
    at = builder.add(job, builder.mul(what, ir.Constant(_WORD, 8)))
    return builder.load(_at(builder, builder.add(at, ir.Constant(_WORD, _HEAD))))


@intrinsic
def _pointer(typingctx, address, like):
    """With the type of `like`."""
    build = lambda context, builder, sig, args: builder.inttoptr(
        args[0], context.get_value_type(like)
    )
    return like(types.intp, like), build


@intrinsic
def _wide_pointer(typingctx, address, like):
    """To numbers in the dtype of the statistics, that of weights and sums."""
    wide = types.CPointer(_wide(like.dtype))
    build = lambda context, builder, sig, args: builder.inttoptr(
        args[0], context.get_value_type(wide)
    )
    return wide(types.intp, like), build


@intrinsic
def _beyond(typingctx, pointer, i):
    """The pointer, so many entries further."""
    return pointer(pointer, types.intp), lambda context, builder, sig, args: builder.gep(
        args[0], [args[1]]
    )


@intrinsic
def _smallest(typingctx, pointer):
    """Of the statistics' numbers, whose reciprocal is one as well."""
    smallest = 2.0**-120 if _wide(pointer.dtype) == types.float32 else 2.0**-1000
    build = lambda context, builder, sig, args: ir.Constant(ir.DoubleType(), smallest)
    return types.float64(pointer), build


@intrinsic
def _number(typingctx, value, pointer):
    """In the dtype of the statistics."""
    to = _wide(pointer.dtype)
    build = lambda context, builder, sig, args: context.cast(builder, args[0], types.float64, to)
    return to(types.float64, pointer), build


@intrinsic
def _load(typingctx, pointer, i):
    stored = pointer.dtype

    def build(context, builder, sig, args):
        bits = builder.load(builder.gep(args[0], [args[1]]))
        if stored == types.uint16:
            word = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(word, ir.FloatType())
        if stored == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        return bits

    return _wide(stored)(pointer, types.intp), build


@intrinsic
def _store(typingctx, pointer, i, value):
    stored = pointer.dtype

    def build(context, builder, sig, args):
        to, i, value = args
        if stored == types.uint16:
            value = _to_bfloat16(builder, value)
        if stored == types.int16:
            value = builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        builder.store(value, builder.gep(to, [i]))

    return types.void(pointer, types.intp, _wide(stored)), build


def _to_bfloat16(builder, value):
    """To nearest, ties to even; what is no number stays none."""
    int32 = ir.IntType(32)
    number = lambda n: ir.Constant(int32, n)
    bits = builder.bitcast(value, int32)
    upper = builder.lshr(bits, number(16))
    rounding = builder.add(builder.and_(upper, number(1)), number(0x7FFF))
    rounded = builder.lshr(builder.add(bits, rounding), number(16))
    no_number = builder.fcmp_unordered("uno", value, value)
    quiet = builder.or_(upper, number(0x40))
    return builder.trunc(builder.select(no_number, quiet, rounded), ir.IntType(16))


@intrinsic(prefer_literal=True)
def _like(typingctx, dtype):
    """A pointer to nothing, whose type is all that it is for: of a dtype, by its number."""
    kind = types.CPointer(_STORED[dtype.literal_value])
    return kind(dtype), lambda context, builder, sig, args: context.get_constant_null(kind)


def _symbol(direction: int, dtype: int) -> str:
    return f"eqx_norms_{_DIRECTIONS[direction]}_{_DTYPES[dtype]}"


@intrinsic(prefer_literal=True)
def _part(typingctx, direction, dtype):
    """The address of what each thread does, which is compiled by itself."""
    name = _symbol(direction.literal_value, dtype.literal_value)

    def build(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [_WORD])
        part = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.ptrtoint(part, _WORD)

    return types.intp(direction, dtype), build


# ---- XLA's structures (xla/ffi/api/c_api.h), by the offsets of what is read of them.

_EXTENSION, _API, _CONTEXT, _ARGS, _RESULT_COUNT, _RESULTS = 8, 16, 24, 72, 96, 112
_ATTRIBUTES, _FUTURE, _BUFFER_DATA, _SCALAR_DATA, _ARRAY_DATA = 160, 168, 24, 8, 16
_ERROR_CREATE, _ERROR_DESTROY, _SCHEDULE, _THREADS = 48, 64, 136, 144
_FUTURE_CREATE, _SET_AVAILABLE = 152, 160
_METADATA, _RESOURCE_EXHAUSTED = 1, 8
_VERSION = 0 | 3 << 32  # That of jaxlib 0.10.2. A later XLA takes what was written for an older.

# ---- A job: a block of memory for one call, whose chunks any thread may take. Nobody waits for a
# chunk that another has: a call returns with XLA's promise, which the last chunk keeps. So a pool
# that is busy, or of one thread, does no harm; and a task that comes late finds no chunk left, in
# a block that lives until the last has gone.

_JOB_API, _JOB_FUTURE, _REFERENCES, _NEXT, _DONE, _EPS = 0, 8, 16, 24, 32, 40
_NO_MEMORY, _NO_JOB = 0, -1
_OPERANDS = 48  # six: what is read, then what is written
_HEAD = 96  # the plan follows

# ---- What Plan says, by its place.

_OUTER, _PARAMS, _INNER, _CHANNELS, _RUN, _CENTRE = range(6)
_BY_OUTER, _BY_PARAMS, _BY_INNER, _CHUNKS, _BLOCK, _PARTIALS, _SCRATCH, _SIZES = range(6, 14)


@_control
def _is_done(api, error):
    """Whether a call of XLA's came back without an error, which is destroyed."""
    if error == 0:
        return True
    args = _arguments(24)
    _set_word(args + 16, error)
    _call(_word(api + _ERROR_DESTROY), args)
    return False


@_control
def _start(frame):
    """The job of a call. XLA's first call only asks for the version, and brings nothing else."""
    extension = _word(frame + _EXTENSION)
    if extension != 0 and _word(extension + 8) & 0xFFFFFFFF == _METADATA:
        _set_word(_word(extension + 24) + 24, _VERSION)
        return _NO_JOB
    attributes = _word(frame + _ATTRIBUTES)
    plan = _word(_word(attributes + 8) + _ARRAY_DATA)
    job = _allocate(_word(plan + 8 * _BLOCK))
    if job == _NO_MEMORY:
        return job
    for at in range(0, _HEAD, 8):
        _set_word(job + at, 0)
    _set_word(job + _JOB_API, _word(frame + _API))
    _set_word(job + _REFERENCES, 1)
    _set_real(job + _EPS, _real(_word(_word(attributes) + _SCALAR_DATA)))
    for i in range(_SIZES):
        _set_word(job + _HEAD + 8 * i, _word(plan + 8 * i))
    operands, results = _word(frame + _ARGS), _word(frame + _RESULTS)
    for i in range(3):
        _set_word(job + _OPERANDS + 8 * i, _word(_word(operands + 8 * i) + _BUFFER_DATA))
    for i in range(_word(frame + _RESULT_COUNT)):
        _set_word(job + _OPERANDS + 24 + 8 * i, _word(_word(results + 8 * i) + _BUFFER_DATA))
    return job


@_control
def _share(frame, job, task):
    """Puts tasks into XLA's thread pool, for other threads to take part."""
    api, context = _word(frame + _API), _word(frame + _CONTEXT)
    args = _arguments(32)
    _set_word(args + 16, context)
    _set_word(args + 24, args + 32)
    _set_word(args + 32, 1)
    _is_done(api, _call(_word(api + _THREADS), args))
    threads, chunks = _word(args + 32), _plan(job, _CHUNKS)
    helpers = (threads if threads < chunks else chunks) - 1
    if helpers < 1:
        return
    args = _arguments(24)
    if not _is_done(api, _call(_word(api + _FUTURE_CREATE), args)):
        return
    _set_word(job + _JOB_FUTURE, _word(args + 16))
    _set_word(frame + _FUTURE, _word(args + 16))
    args = _arguments(40)
    _set_word(args + 16, context)
    _set_word(args + 24, task)
    _set_word(args + 32, job)
    for _ in range(helpers):
        _fetch_add(job + _REFERENCES, 1)
        if not _is_done(api, _call(_word(api + _SCHEDULE), args)):
            _fetch_add(job + _REFERENCES, -1)


@_control
def _finish(job):
    """Keeps the promise, if there is one."""
    future = _word(job + _JOB_FUTURE)
    if future != 0:
        api, args = _word(job + _JOB_API), _arguments(24)
        _set_word(args + 16, future)
        _is_done(api, _call(_word(api + _SET_AVAILABLE), args))


@_control
def _leave(job):
    if _fetch_add(job + _REFERENCES, -1) == 1:
        _release(job)


@_instruction(types.intp, types.intp)
def _out_of_memory(builder, api):
    """XLA's error, to be returned."""
    number = lambda n: ir.Constant(_WORD, n)
    text = cgutils.make_bytearray(b"eqx_norms: no memory for a kernel\0")
    text = cgutils.global_constant(builder.module, "eqx_norms_no_memory", text)
    space = cgutils.alloca_once(builder, ir.ArrayType(_WORD, 4))
    args = builder.ptrtoint(space, _WORD)
    for i, value in enumerate(
        (number(28), number(0), builder.ptrtoint(text, _WORD), number(_RESOURCE_EXHAUSTED))
    ):
        builder.store(value, _at(builder, builder.add(args, number(8 * i))))
    create = builder.load(_at(builder, builder.add(api, number(_ERROR_CREATE))))
    kind = ir.FunctionType(_WORD, [_WORD])
    return builder.call(builder.inttoptr(create, kind.as_pointer()), [args])


# ---- Sums over entries, in the dtype of the statistics; of at most _SEGMENT at once, and those
# together in float64.

_SEGMENT = 2**14
_SAMPLES = 16


@_elements
def _minus(a, b):
    return a - b


@_sums
def _sample(x, n, scale):
    """About the mean: that of a few entries. Any origin will do that is nearer than the spread."""
    count = n if n < _SAMPLES else _SAMPLES
    step = _quotient(n, count)
    total = _number(0.0, x)
    for i in range(count):
        total += _load(x, i * step) * scale
    return total * _number(1.0 / count, x)


@_sums
def _two_sums(x, n, scale, origin):
    first = second = _number(0.0, x)
    for i in range(n):
        xo = _minus(_load(x, i) * scale, origin)
        first += xo
        second += xo * xo
    return np.float64(first), np.float64(second)


@_sums
def _four_sums(x, g, n, scale, origin):
    first = second = third = fourth = _number(0.0, x)
    for i in range(n):
        xo, gi = _minus(_load(x, i) * scale, origin), _load(g, i)
        first += xo
        second += xo * xo
        third += gi
        fourth += gi * xo
    return np.float64(first), np.float64(second), np.float64(third), np.float64(fourth)


@_sums
def _four_weighted_sums(x, g, weight, n, scale, origin):
    first = second = third = fourth = _number(0.0, x)
    for i in range(n):
        xo, gw = _minus(_load(x, i) * scale, origin), _load(g, i) * _load(weight, i)
        first += xo
        second += xo * xo
        third += gw
        fourth += gw * xo
    return np.float64(first), np.float64(second), np.float64(third), np.float64(fourth)


# ---- The statistics of a row. The mean is origin + d, of x * scale; rstd is of that too.
#
# One pass makes them all, about an origin that is near to the mean. Where it proves to be further
# off than the spread, digits were lost, and the pass is done again about the mean it found. Where
# squares came near to overflow, or vanished beside an eps of as little, it is done again of
# entries scaled by a power of two.


@_sums
def _scale(x, n, eps):
    """A power of two that brings the largest entry to about 1, if eps does not swamp it."""
    most = _number(0.0, x)
    for i in range(n):
        a = abs(_load(x, i))
        most = a if a > most else most
    smallest, largest = _smallest(x), np.float64(most)
    if not 0.0 < largest < np.inf:
        return 1.0
    for least in (smallest, 2.0**-30 * np.sqrt(eps)):
        largest = least if largest < least else largest
    scale = 2.0 ** -np.floor(np.log2(largest))
    # Not below the normal numbers either: XLA's threads take those for zero.
    return scale if scale > smallest else smallest


@_control
def _statistics(x, n, eps, centre):
    scale, is_scaled, is_moved = 1.0, False, False
    origin = _sample(x, n, _number(scale, x)) if centre else _number(0.0, x)
    while True:
        d = square = 0.0
        for at in range(0, n, _SEGMENT):
            entries = n - at if n - at < _SEGMENT else _SEGMENT
            a, b = _two_sums(_beyond(x, at), entries, _number(scale, x), origin)
            d, square = d + a / n, square + b / n
        d = d if centre else 0.0
        variance = square - d * d
        if not (is_scaled or 2.0**-60 < variance + eps < 2.0**60):
            is_scaled, scale = True, _scale(x, n, eps)
            origin = _sample(x, n, _number(scale, x)) if centre else origin
        elif centre and not is_moved and d * d > 0.5 * square:
            is_moved, origin = True, _number(np.float64(origin) + d, x)
        else:
            break
    if variance <= 0.0:  # All entries are alike.
        return scale, origin, d, 1.0 / np.sqrt(eps)
    return scale, origin, d, 1.0 / np.sqrt(variance + eps * scale * scale)


@_control
def _four_statistics(x, g, weight, channels, run, eps, centre, scratch):
    """Also mean(gw) and mean(gw * xhat), and `back`, the scale of what comes back.

    scratch: where channels have runs, the sums of g and of g * xo of each.
    """
    n = channels * run
    scale, is_scaled, is_moved = 1.0, False, False
    origin = _sample(x, n, _number(scale, x)) if centre else _number(0.0, x)
    while True:
        d = square = of_gw = of_gwx = 0.0
        wide = _number(scale, x)
        for k in range(1 if run == 1 else channels):
            of_g = of_gx = 0.0
            length = n if run == 1 else run
            for at in range(0, length, _SEGMENT):
                entries, start = length - at, k * run + at
                entries = entries if entries < _SEGMENT else _SEGMENT
                if run == 1:
                    a, b, e, f = _four_weighted_sums(
                        _beyond(x, at), _beyond(g, at), _beyond(weight, at), entries, wide, origin
                    )
                else:
                    a, b, e, f = _four_sums(
                        _beyond(x, start), _beyond(g, start), entries, wide, origin
                    )
                d, square, of_g, of_gx = d + a / n, square + b / n, of_g + e, of_gx + f
            if run == 1:
                of_gw, of_gwx = of_g / n, of_gx / n
            else:
                _set_real(scratch + 16 * k, of_g)
                _set_real(scratch + 16 * k + 8, of_gx)
                of_gw += of_g * np.float64(_load(weight, k)) / n
                of_gwx += of_gx * np.float64(_load(weight, k)) / n
        d = d if centre else 0.0
        variance = square - d * d
        if not (is_scaled or 2.0**-60 < variance + eps < 2.0**60):
            is_scaled, scale = True, _scale(x, n, eps)
            origin = _sample(x, n, _number(scale, x)) if centre else origin
        elif centre and not is_moved and d * d > 0.5 * square:
            is_moved, origin = True, _number(np.float64(origin) + d, x)
        else:
            break
    alike = variance <= 0.0
    back = 1.0 if alike else scale
    rstd = 1.0 / np.sqrt(eps if alike else variance + eps * scale * scale)
    return scale, origin, d, rstd, back, of_gw if centre else 0.0, (of_gwx - d * of_gw) * rstd


# ---- What is written.


@_elements
def _write_y(y, x, weight, bias, n, how):
    scale, origin, d, rstd = how
    for i in range(n):
        xhat = _minus(_minus(_load(x, i) * scale, origin), d) * rstd
        _store(y, i, xhat * _load(weight, i) + _load(bias, i))


@_elements
def _write_run_of_y(y, x, weight, bias, n, how):
    scale, origin, d, rstd = how
    for i in range(n):
        xhat = _minus(_minus(_load(x, i) * scale, origin), d) * rstd
        _store(y, i, xhat * weight + bias)


@_elements
def _write_dx(dx, x, g, weight, dweight, dbias, n, how):
    scale, origin, d, rstd, back, of_gw, of_xhat = how
    for i in range(n):
        gi = _load(g, i)
        xhat = _minus(_minus(_load(x, i) * scale, origin), d) * rstd
        _store(dx, i, (gi * _load(weight, i) - of_gw - xhat * of_xhat) * rstd * back)
        _store(dweight, i, _load(dweight, i) + gi * xhat)
        _store(dbias, i, _load(dbias, i) + gi)


@_elements
def _write_dx_unbiased(dx, x, g, weight, dweight, n, how):
    scale, origin, d, rstd, back, of_gw, of_xhat = how
    for i in range(n):
        gi = _load(g, i)
        xhat = _minus(_minus(_load(x, i) * scale, origin), d) * rstd
        _store(dx, i, (gi * _load(weight, i) - of_gw - xhat * of_xhat) * rstd * back)
        _store(dweight, i, _load(dweight, i) + gi * xhat)


@_elements
def _write_run_of_dx(dx, x, g, weight, n, how):
    scale, origin, d, rstd, back, of_gw, of_xhat = how
    for i in range(n):
        xhat = _minus(_minus(_load(x, i) * scale, origin), d) * rstd
        _store(dx, i, (_load(g, i) * weight - of_gw - xhat * of_xhat) * rstd * back)


@_elements
def _zero(to, n):
    for i in range(n):
        _store(to, i, _number(0.0, to))


@_elements
def _add(to, n, by):
    for i in range(n):
        _store(to, i, _load(to, i) + _load(by, i))


# ---- Rows are counted by three numbers, (outer, params, inner), and a chunk is a range of each.


@_control
def _range(job, axis, part):
    """From where to where."""
    size, parts = _plan(job, _OUTER + axis), _plan(job, _BY_OUTER + axis)
    return _quotient(size * part, parts), _quotient(size * (part + 1), parts)


def _forward_part(dtype):
    """What each thread does, with the chunks that it comes upon."""

    def part(job):
        like = _like(dtype)
        x, y = _pointer(_word(job + _OPERANDS), like), _pointer(_word(job + _OPERANDS + 24), like)
        weight = _wide_pointer(_word(job + _OPERANDS + 8), like)
        bias = _wide_pointer(_word(job + _OPERANDS + 16), like)
        eps, centre = _real(job + _EPS), _plan(job, _CENTRE) != 0
        channels, run = _plan(job, _CHANNELS), _plan(job, _RUN)
        by_outer, by_params = _plan(job, _BY_OUTER), _plan(job, _BY_PARAMS)
        chunks = _plan(job, _CHUNKS)
        i = _fetch_add(job + _NEXT, 1)
        while i < chunks:
            o0, o1 = _range(job, 0, _remainder(_quotient(i, by_params), by_outer))
            p0, p1 = _range(job, 1, _remainder(i, by_params))
            k0, k1 = _range(job, 2, _quotient(i, by_params * by_outer))
            for o in range(o0, o1):
                for p in range(p0, p1):
                    w, b = _beyond(weight, p * channels), _beyond(bias, p * channels)
                    for k in range(k0, k1):
                        at = (
                            ((o * _plan(job, _PARAMS) + p) * _plan(job, _INNER) + k)
                            * channels
                            * run
                        )
                        xr, yr = _beyond(x, at), _beyond(y, at)
                        scale, origin, d, rstd = _statistics(xr, channels * run, eps, centre)
                        how = _number(scale, x), origin, _number(d, x), _number(rstd, x)
                        if run == 1:
                            _write_y(yr, xr, w, b, channels, how)
                            continue
                        for c in range(channels):
                            to, of = _beyond(yr, c * run), _beyond(xr, c * run)
                            _write_run_of_y(to, of, _load(w, c), _load(b, c), run, how)
            if _fetch_add(job + _DONE, 1) == chunks - 1:
                _finish(job)
            i = _fetch_add(job + _NEXT, 1)
        _leave(job)

    return part


@_control
def _add_partials(job, like):
    """What the chunks have come to, always in one order."""
    size = _plan(job, _PARAMS) * _plan(job, _CHANNELS)
    partials = _wide_pointer(job + _plan(job, _PARTIALS), like)
    parts = _plan(job, _BY_OUTER) * _plan(job, _BY_INNER)
    for which in range(2):
        result = _word(job + _OPERANDS + 32 + 8 * which)
        if result != 0:
            # So many at once as stay in the first cache.
            for at in range(0, size, 2**11):
                to, n = _beyond(_wide_pointer(result, like), at), size - at
                n = n if n < 2**11 else 2**11
                _zero(to, n)
                for part in range(parts):
                    _add(to, n, _beyond(partials, (2 * part + which) * size + at))


def _backward_part(dtype):

    def part(job):
        like = _like(dtype)
        g, x = _pointer(_word(job + _OPERANDS), like), _pointer(_word(job + _OPERANDS + 8), like)
        weight = _wide_pointer(_word(job + _OPERANDS + 16), like)
        dx = _pointer(_word(job + _OPERANDS + 24), like)
        has_bias, has_partials = _word(job + _OPERANDS + 40) != 0, _plan(job, _PARTIALS) != 0
        eps, centre = _real(job + _EPS), _plan(job, _CENTRE) != 0
        channels, run = _plan(job, _CHANNELS), _plan(job, _RUN)
        by_outer, by_params, by_inner = (
            _plan(job, _BY_OUTER),
            _plan(job, _BY_PARAMS),
            _plan(job, _BY_INNER),
        )
        chunks, size = _plan(job, _CHUNKS), _plan(job, _PARAMS) * channels
        i = _fetch_add(job + _NEXT, 1)
        while i < chunks:
            by_o = _remainder(_quotient(i, by_params), by_outer)
            by_k = _quotient(i, by_params * by_outer)
            o0, o1 = _range(job, 0, by_o)
            p0, p1 = _range(job, 1, _remainder(i, by_params))
            k0, k1 = _range(job, 2, by_k)
            dweight = _wide_pointer(_word(job + _OPERANDS + 32), like)
            dbias = _wide_pointer(_word(job + _OPERANDS + 40), like)
            if has_partials:
                partials = _wide_pointer(job + _plan(job, _PARTIALS), like)
                dweight = _beyond(partials, 2 * size * (by_o * by_inner + by_k))
                dbias = _beyond(dweight, size)
            _zero(_beyond(dweight, p0 * channels), (p1 - p0) * channels)
            if has_bias:
                _zero(_beyond(dbias, p0 * channels), (p1 - p0) * channels)
            scratch = job + _plan(job, _SCRATCH) + 16 * channels * i
            for o in range(o0, o1):
                for p in range(p0, p1):
                    w, dw = _beyond(weight, p * channels), _beyond(dweight, p * channels)
                    db = _beyond(dbias, p * channels)
                    for k in range(k0, k1):
                        at = (
                            ((o * _plan(job, _PARAMS) + p) * _plan(job, _INNER) + k)
                            * channels
                            * run
                        )
                        gr, xr, dxr = _beyond(g, at), _beyond(x, at), _beyond(dx, at)
                        scale, origin, d, rstd, back, of_gw, of_xhat = _four_statistics(
                            xr, gr, w, channels, run, eps, centre, scratch
                        )
                        how = (
                            *(_number(scale, x), origin, _number(d, x), _number(rstd, x)),
                            *(_number(back, x), _number(of_gw, x), _number(of_xhat, x)),
                        )
                        if run == 1:
                            if has_bias:
                                _write_dx(dxr, xr, gr, w, dw, db, channels, how)
                            else:
                                _write_dx_unbiased(dxr, xr, gr, w, dw, channels, how)
                            continue
                        for c in range(channels):
                            of_g, of_gx = _real(scratch + 16 * c), _real(scratch + 16 * c + 8)
                            term = _number((of_gx - d * of_g) * rstd, x)
                            _store(dw, c, _load(dw, c) + term)
                            if has_bias:
                                _store(db, c, _load(db, c) + _number(of_g, x))
                            to, of, by = (
                                _beyond(dxr, c * run),
                                _beyond(xr, c * run),
                                _beyond(gr, c * run),
                            )
                            _write_run_of_dx(to, of, by, _load(w, c), run, how)
            if _fetch_add(job + _DONE, 1) == chunks - 1:
                if has_partials:
                    _add_partials(job, like)
                _finish(job)
            i = _fetch_add(job + _NEXT, 1)
        _leave(job)

    return part


# ---- The handlers.


def _handler(direction, dtype):
    def handler(frame):
        job = _start(frame)
        if job == _NO_JOB:
            return 0
        if job == _NO_MEMORY:
            return _out_of_memory(_word(frame + _API))
        if _plan(job, _CHUNKS) > 1:
            _share(frame, job, _part(direction, dtype))
        _call(_part(direction, dtype), job)
        return 0

    return handler


def has_half() -> bool:
    """Whether the processor converts float16 itself; LLVM would call what may not be there."""
    features = binding.get_host_cpu_features()
    return features.get("f16c", "x86" not in binding.get_default_triple().split("-")[0])


def compiled(direction: str, dtype: str) -> tuple:
    """A handler, and what it calls; from numba's cache on disk if they are there.

    By themselves, for numba optimises what is called again with each that calls it.
    """
    which = _DIRECTIONS.index(direction), _DTYPES.index(dtype)
    part = (_forward_part, _backward_part)[which[0]](which[1])
    part = numba.cfunc(types.void(types.intp), cache=True)(inspect.unwrap(part))
    binding.add_symbol(_symbol(*which), part.address)
    handler = inspect.unwrap(_handler(*which))
    return numba.cfunc(types.intp(types.intp), cache=True)(handler), part
