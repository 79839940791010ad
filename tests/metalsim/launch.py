"""Dispatch: metal_kernel(), a drop-in for mx.fast.metal_kernel, and Library, for whole .metal files."""

import contextlib
import ctypes
import dataclasses
import math
import mmap
import re
import threading
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from . import compile as compiler
from .instrument import PAGE_BYTES
from .signature import BUILTINS, generate
from .translate import MSLError, Source

# bfloat16 travels as its bits: NumPy has no such type.
NUMPY_TYPE = {
    mx.bool_: np.bool_,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,
    mx.float32: np.float32,
}
ATTRIBUTE_SLOT = {name: slot for slot, name in enumerate(BUILTINS)}
THREADGROUP_MEMORY_BYTES = 32768  # Apple GPUs, per threadgroup
MAX_THREADS_PER_THREADGROUP = 1024
CHUNK_BYTES = 1 << 16  # buffers start in chunks of their own, so an address tells its buffer
GAP_CHUNKS = 2
NO_OWNER = 0xFFFF
VECTOR_ALIGNMENT = 16  # the largest alignment an MSL type asks for
UNWRITTEN = 0xFF  # byte that fills new outputs: NaN as float, large as integer
ORDERS = ("natural", "reversed", "random")


@dataclass
class Config:
    """How dispatches run. Change it for a while with configured()."""

    order: str = "natural"  # schedule of threads and threadgroups: natural, reversed or random
    seed: int = 1  # of the random order
    races: bool = True  # report data races
    past_end: bool = False  # report pointers beyond the end of their array, too, not only before it
    ignore: tuple = ()  # reports that contain one of these texts do not raise (Stats.reports has them)
    flags: tuple = ()  # extra clang flags
    timeout: int = 120  # seconds after which a dispatch that has not ended is an error


config = Config()


@contextlib.contextmanager
def configured(**changes):
    """Change `config` within a with block: configured(order="random", seed=3)."""
    before = dataclasses.asdict(config)
    for name in changes:
        if name not in before:
            raise TypeError(f"config has no '{name}'; it has {', '.join(before)}")
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        yield config
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@dataclass
class Stats:
    """What one dispatch did, summed over its threads.

    ops               instructions by class: fp fma fdiv math int idiv bit cmp cvt branch
    reads, writes     {buffer: [uint32 per BYTE of it]}, how often each byte was read or written
    read_bytes, written_bytes, loads   {buffer: total}; loads counts instructions, whatever their width
    threadgroup_*     bytes of threadgroup memory read, written and declared
    simd_ops          simdgroup functions, per simdgroup; barriers: per simdgroup or threadgroup that met
    reports           every finding, also those that config.ignore keeps from raising
    """

    threads: int = 0
    ops: dict = field(default_factory=dict)
    reads: dict = field(default_factory=dict)
    writes: dict = field(default_factory=dict)
    read_bytes: dict = field(default_factory=dict)
    written_bytes: dict = field(default_factory=dict)
    loads: dict = field(default_factory=dict)
    threadgroup_read: int = 0
    threadgroup_written: int = 0
    threadgroup_size: int = 0
    simd_ops: int = 0
    barriers: int = 0
    atomics: int = 0
    reports: list = field(default_factory=list)


last_stats = None
_one_dispatch = threading.Lock()  # the scheduler's state is global, and so are the counters of a kernel


# ---- arguments -----------------------------------------------------------------------------------


@dataclass
class Argument:
    """A kernel argument in memory.

    data      the bytes the kernel may touch: [n_bytes] uint8
    start     offset in data of what the kernel's pointer points at; not 0 with negative strides
    phase     address of data[0] modulo VECTOR_ALIGNMENT: a view may start anywhere in its buffer
    """

    name: str
    data: np.ndarray
    start: int = 0
    phase: int = 0
    is_output: bool = False
    is_initialised: bool = True


def _argument(name, values):
    return Argument(name, np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def _host_view(array):
    """The NumPy view of an mx.array, with the strides and the address that MLX itself uses. No copy."""
    if array.dtype != mx.bfloat16:
        return np.asarray(array)
    if array.ndim:
        return np.asarray(array.view(mx.uint16))
    return np.asarray(array.reshape(1).view(mx.uint16)).reshape(())


def _address(view):
    return view.__array_interface__["data"][0]


def _phase(view):
    """Alignment of the view relative to the start of its buffer. On Apple GPUs buffers start at page
    boundaries; MLX's CPU allocator keeps a header of 8 bytes in front, so compare with an array that starts
    at its buffer."""
    return (_address(view) - _address(np.asarray(mx.zeros((1,))))) % VECTOR_ALIGNMENT


def _input(name, array, ensure_row_contiguous):
    """(Argument, strides in elements) of one input, copied or not as MLX would."""
    view = _host_view(array)
    if view.size == 0 or (ensure_row_contiguous and not view.flags.c_contiguous):
        strides = [math.prod(array.shape[i + 1 :]) for i in range(array.ndim)]
        return _argument(name, view), strides
    reach = [(n - 1) * stride for n, stride in zip(view.shape, view.strides)]
    before, after = -sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + view.itemsize
    phase = (_phase(view) - before) % VECTOR_ALIGNMENT
    span = (ctypes.c_uint8 * (before + after)).from_address(_address(view) - before)
    data = np.frombuffer(span, np.uint8).copy()  # copied here, while `view` keeps the memory alive
    return Argument(name, data, before, phase), [stride // view.itemsize for stride in view.strides]


def _output(name, n_bytes):
    return Argument(name, np.full(n_bytes, UNWRITTEN, np.uint8), is_output=True, is_initialised=False)


# ---- the structures of runtime.cpp ---------------------------------------------------------------


def _fields(kind, names):
    return [(name, kind) for name in names.split()]


class _Buffer(ctypes.Structure):
    _fields_ = _fields(
        ctypes.c_uint64, "begin end byte_reads byte_writes bytes_read bytes_written n_loads n_stores"
    ) + _fields(ctypes.c_uint32, "writable initialised")


class _Dispatch(ctypes.Structure):
    _fields_ = (
        _fields(
            ctypes.c_uint64,
            "entry arguments buffers n_buffers chunk_owner arena arena_size threadgroup "
            "threadgroup_size threadgroup_variables n_threadgroup_variables constants "
            "n_constants counters counters_size block_lines",
        )
        + _fields(ctypes.c_uint32 * 3, "grid group")
        + _fields(ctypes.c_uint32, "order seed check_races past_end timeout_seconds padding")
        + _fields(
            ctypes.c_uint64,
            "log log_size n_reports fatal n_simd_ops n_barriers n_threads "
            "threadgroup_read threadgroup_written constant_read n_atomics",
        )
    )


class _Arena:
    """The device memory of one dispatch: every buffer in chunks of its own, with gaps around it."""

    def __init__(self, arguments):
        self.begin, n_chunks = [], 1
        for a in arguments:
            self.begin.append(n_chunks * CHUNK_BYTES + a.phase)
            n_chunks += -(-(len(a.data) + a.phase) // CHUNK_BYTES) + GAP_CHUNKS
        self.size = n_chunks * CHUNK_BYTES
        self.bytes = np.frombuffer(mmap.mmap(-1, self.size), np.uint8)
        self.address = self.bytes.ctypes.data
        self.owner = np.full(n_chunks, NO_OWNER, np.uint16)
        self.buffers = (_Buffer * (len(arguments) + 1))()
        self.counts = []  # (reads, writes) per byte, of each buffer
        for i, (a, begin) in enumerate(zip(arguments, self.begin)):
            end = begin + len(a.data)
            self.bytes[begin:end] = a.data
            # the gap chunks next to a buffer are its own too: a near miss is reported with its name
            self.owner[begin // CHUNK_BYTES - 1 : end // CHUNK_BYTES + 2] = i
            reads, writes = np.zeros((2, len(a.data)), np.uint32)
            self.counts.append((reads, writes))
            self.buffers[i] = _Buffer(
                self.address + begin,
                self.address + end,
                reads.ctypes.data,
                writes.ctypes.data,
                writable=a.is_output,
                initialised=a.is_initialised,
            )

    def read(self, i):
        begin, end = (address - self.address for address in (self.buffers[i].begin, self.buffers[i].end))
        return self.bytes[begin:end].copy()


# ---- kernels -------------------------------------------------------------------------------------


def _entry(source, name, expression):
    """(buffers in the order of their parameters, C++ function that calls the kernel `name` of `source`)."""
    if name not in source.kernels:
        raise MSLError(f"no kernel {name}; there are {sorted(source.kernels)}")
    buffers, call = [], [expression or name]
    for parameter, attributes in source.kernels[name]:
        slot = next((ATTRIBUTE_SLOT[a] for a in attributes if a in ATTRIBUTE_SLOT), None)
        if slot is not None:
            call.append(f"*(uint3*)attributes->value[{slot}]")
        elif not attributes or any(a.startswith("buffer(") for a in attributes):
            call.append(f"arguments[{len(buffers)}]")
            buffers.append(parameter)
        else:
            raise MSLError(f"parameter {parameter} of {name} has an unknown attribute: {attributes}")
    return buffers, (
        'extern "C" __attribute__((visibility("default")))\n'
        "void msl_entry(void **arguments, msl::Attributes *attributes) "
        f"{{ msl::call({', '.join(call)}); }}"
    )


def _flags(fast_math):
    return (("-ffast-math",) if fast_math else ()) + tuple(config.flags)


def code_size(text, name, expression=None, constants=None, fast_math=False):
    """(LLVM IR instructions, CPU seconds to compile to them) of one kernel of an MSL text, after -O2, with
    what it calls: a proxy for what Apple's compiler will have to do.

    text, name, expression: as generate() returns them, or any text with a kernel `name`, instantiated by
    `expression` (such as "name<float, 128>"). constants: function constants, as for Library. Raises MSLError
    for a text that a launch would refuse.
    """
    source = Source(text, constants)
    return compiler.code_size(source.cpp, _entry(source, name, expression)[1], _flags(fast_math))


class Function:
    """One compiled kernel: `name` of `source`, instantiated by `expression` (such as "name<float, 128>")."""

    def __init__(self, source, name, expression=None, fast_math=False):
        self.buffers, entry = _entry(source, name, expression)
        compiler.runtime()
        path, info = compiler.compile_kernel(source.cpp, entry, _flags(fast_math))
        self.library = ctypes.CDLL(str(path))
        self.blocks = info["blocks"]
        self.names = {kind: info[kind] for kind in ("threadgroup_variables", "constants")}
        # [n, 2]: offset in msl_threadgroup, or address, and size of each of them
        self.threadgroup_variables, self.constants = (self._spans(kind) for kind in self.names)

    def _spans(self, kind):
        numbers = ctypes.c_uint64 * (2 * len(self.names[kind]))
        return np.array(numbers.in_dll(self.library, f"msl_{kind}"), np.uint64).reshape(-1, 2)

    def dispatch(self, arguments, grid, group):
        """Run it. arguments: {parameter: Argument}; those left out (function constants) are null pointers.

        grid, group: threads along x, y, z, as for dispatchThreads. Returns {output: bytes}. Raises MSLError
        with everything that was found, and ValueError for sizes that Metal refuses.
        """
        grid, group = _check_sizes(grid, group)
        variables = self.threadgroup_variables
        threadgroup_size = int((-(-variables[:, 1].astype(np.int64) // 16) * 16).sum())
        if threadgroup_size > THREADGROUP_MEMORY_BYTES:
            raise MSLError(f"threadgroup memory: {threadgroup_size} bytes, the limit is {THREADGROUP_MEMORY_BYTES}")
        present = [arguments[name] for name in self.buffers if name in arguments]
        with _one_dispatch:
            return self._run(arguments, present, grid, group, threadgroup_size)

    def _run(self, arguments, present, grid, group, threadgroup_size):
        global last_stats
        arena = _Arena(present)
        pointers = {a.name: arena.address + begin + a.start for a, begin in zip(present, arena.begin)}
        pointer_array = (ctypes.c_void_p * (len(self.buffers) + 1))(*map(pointers.get, self.buffers))
        variables, constants = self.threadgroup_variables, self.constants
        threadgroup_end = int(variables.sum(1).max(initial=0))
        threadgroup = (ctypes.c_uint8 * (threadgroup_end + 1)).in_dll(self.library, "msl_threadgroup")
        counters = self._counters()
        log = ctypes.create_string_buffer(16384)
        d = _Dispatch(
            entry=ctypes.cast(self.library.msl_entry, ctypes.c_void_p).value,
            arguments=ctypes.addressof(pointer_array),
            buffers=ctypes.addressof(arena.buffers),
            n_buffers=len(present),
            chunk_owner=arena.owner.ctypes.data,
            arena=arena.address,
            arena_size=arena.size,
            threadgroup=ctypes.addressof(threadgroup),
            threadgroup_size=threadgroup_end,
            threadgroup_variables=variables.ctypes.data,
            n_threadgroup_variables=len(variables),
            constants=constants.ctypes.data,
            n_constants=len(constants),
            counters=ctypes.addressof(counters),
            counters_size=ctypes.sizeof(counters),
            block_lines=ctypes.addressof(ctypes.c_uint32.in_dll(self.library, "msl_block_lines")),
            grid=grid,
            group=group,
            order=ORDERS.index(config.order),
            seed=config.seed,
            check_races=config.races,
            past_end=config.past_end,
            timeout_seconds=config.timeout,
            log=ctypes.addressof(log),
            log_size=len(log),
        )
        ctypes.memset(counters, 0, ctypes.sizeof(counters))
        _dispatch_with_time_limit(d)
        names = [a.name for a in present]
        named = {
            "buffer": names,
            "threadgroup variable": self.names["threadgroup_variables"],
            "constant": self.names["constants"],
        }
        text = re.sub(f"({'|'.join(named)}) #(\\d+)", lambda m: f"'{named[m[1]][int(m[2])]}'", log.value.decode())
        last_stats = self._stats(d, arena, names, counters, threadgroup_size, text.splitlines())
        bad = [r for r in last_stats.reports if not any(ignored in r for ignored in config.ignore)]
        if bad:
            raise MSLError(f"{d.n_reports} report(s) while running:\n" + "\n".join(bad))
        return {a.name: arena.read(i) for i, a in enumerate(present) if a.is_output}

    def _counters(self):
        """The block counters: whole pages, so that the runtime can make them unreadable."""
        n_bytes = -(-8 * (len(self.blocks) + 1) // PAGE_BYTES) * PAGE_BYTES
        return (ctypes.c_uint64 * (n_bytes // 8)).in_dll(self.library, "msl_blocks")

    def _stats(self, d, arena, names, counters, threadgroup_size, reports):
        ops = {}
        for executions, instructions in zip(counters, self.blocks):
            for name, n in instructions.items():
                ops[name] = ops.get(name, 0) + executions * n
        buffers = dict(zip(names, arena.buffers))
        return Stats(
            threads=d.n_threads,
            ops=ops,
            reads={name: reads for name, (reads, _) in zip(names, arena.counts)},
            writes={name: writes for name, (_, writes) in zip(names, arena.counts)},
            read_bytes={name: b.bytes_read for name, b in buffers.items()},
            written_bytes={name: b.bytes_written for name, b in buffers.items()},
            loads={name: b.n_loads for name, b in buffers.items()},
            threadgroup_read=d.threadgroup_read,
            threadgroup_written=d.threadgroup_written,
            threadgroup_size=threadgroup_size,
            simd_ops=d.n_simd_ops,
            barriers=d.n_barriers,
            atomics=d.n_atomics,
            reports=reports,
        )


def _check_sizes(grid, group):
    if len(grid) != 3 or len(group) != 3:
        raise ValueError(f"grid and threadgroup need 3 dimensions each, got {tuple(grid)} and {tuple(group)}")
    if any(n < 1 for n in (*grid, *group)):
        raise ValueError(f"grid and threadgroup dimensions must be at least 1, got {tuple(grid)} and {tuple(group)}")
    if math.prod(group) > MAX_THREADS_PER_THREADGROUP:
        raise ValueError(
            f"Thread group size ({math.prod(group)}) is greater than the maximum allowed "
            f"threads per threadgroup ({MAX_THREADS_PER_THREADGROUP})."
        )
    return tuple(grid), tuple(min(a, b) for a, b in zip(group, grid))  # MLX clips the group to the grid


def _dispatch_with_time_limit(d):
    """msl_dispatch releases the GIL, so the timer's thread runs next to it."""
    runtime = compiler.runtime()
    lock, ended = threading.Lock(), False

    def expire():
        with lock:
            if not ended:
                runtime.msl_expire()

    timer = threading.Timer(config.timeout, expire)
    timer.daemon = True
    timer.start()
    try:
        runtime.msl_dispatch(ctypes.byref(d))
    finally:
        with lock:
            ended = True
        timer.cancel()


class Library:
    """The kernels of a whole MSL text, without MLX's generated signature.

    library = Library(text, constants={26: 64})                     # function constants, by index or name
    outs = library("sdpa_vector<float, 128>", arguments, outputs, grid, group)
    """

    def __init__(self, text, constants=None):
        self.source, self.functions = Source(text, constants), {}

    def __call__(self, expression, args, outputs, grid, group):
        """args: {parameter: array or scalar}; outputs: {parameter: (shape, dtype)}; NumPy arrays and dtypes.

        Arguments are bound by parameter name; bfloat16 travels as uint16. Returns {output: NumPy array}.
        """
        key = (expression, tuple(config.flags))
        if key not in self.functions:
            self.functions[key] = Function(self.source, expression.split("<")[0].strip(), expression)
        arguments = {name: _argument(name, np.asarray(value)) for name, value in args.items()}
        for name, (shape, dtype) in outputs.items():
            arguments[name] = _output(name, math.prod(shape) * np.dtype(dtype).itemsize)
        raw = self.functions[key].dispatch(arguments, grid, group)
        return {name: raw[name].view(dtype).reshape(shape) for name, (shape, dtype) in outputs.items()}


def metal_kernel(
    name,
    input_names,
    output_names,
    source,
    header="",
    ensure_row_contiguous=True,
    atomic_outputs=False,
    compile_options=None,
):
    """Same signature and call convention as mx.fast.metal_kernel (mlx 0.32); the call runs at once, on the
    CPU.

    Raises ValueError where MLX does, and MSLError for a kernel that does not compile or does something
    undefined.
    """
    if not output_names:
        raise ValueError("[metal_kernel] Must specify at least one output.")
    fast_math = _is_fast_math(compile_options or {})
    functions = {}

    def call(
        *,
        inputs,
        output_shapes,
        output_dtypes,
        grid,
        threadgroup,
        template=None,
        init_value=None,
        verbose=False,
        stream=None,
    ):
        _check_lengths(inputs, input_names, "inputs")
        _check_lengths(output_shapes, output_names, "output_shapes")
        _check_lengths(output_dtypes, output_names, "output_dtypes")
        inputs = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        for dtype in (*(a.dtype for a in inputs), *output_dtypes):
            if dtype not in NUMPY_TYPE:
                raise MSLError(f"the simulator does not take {dtype} arrays")
        text, kernel, expression = generate(
            name, input_names, output_names, source, header, atomic_outputs, inputs, output_dtypes, template
        )
        if verbose:
            print(f"Generated source code for `{name}`:\n```\n{text}\n```")
        key = (text, tuple(config.flags))
        if key not in functions:
            functions[key] = Function(Source(text), kernel, expression, fast_math)
        arguments = {}
        for n, array in zip(input_names, inputs):
            arguments[n], strides = _input(n, array, ensure_row_contiguous)
            about = {
                f"{n}_shape": np.array(array.shape, np.int32),
                f"{n}_strides": np.array(strides, np.int64),
                f"{n}_ndim": np.int32(array.ndim),
            }
            arguments |= {parameter: _argument(parameter, value) for parameter, value in about.items()}
        for n, shape, dtype in zip(output_names, output_shapes, output_dtypes):
            arguments[n] = _output(n, math.prod(shape) * np.dtype(NUMPY_TYPE[dtype]).itemsize)
            if init_value is not None:
                initial = _host_view(mx.full((math.prod(shape),), init_value, dtype))
                arguments[n] = dataclasses.replace(_argument(n, initial), is_output=True)
        raw = functions[key].dispatch(arguments, grid, threadgroup)
        return [_to_mlx(raw[n], shape, dtype) for n, shape, dtype in zip(output_names, output_shapes, output_dtypes)]

    return call


def _is_fast_math(compile_options):
    for option in compile_options:
        if option != "math_mode":
            raise ValueError(f"[metal_kernel] Unknown compile option `{option}`.")
    mode = compile_options.get("math_mode", "safe")
    if mode not in ("safe", "relaxed", "fast"):
        raise ValueError("[metal_kernel] Expected math_mode to be 'safe', 'relaxed', or 'fast'.")
    return mode != "safe"


def _check_lengths(got, names, what):
    if len(got) != len(names):
        raise ValueError(f"[metal_kernel] Expected `{what}` to have size {len(names)} but got size {len(got)}.")


def _to_mlx(raw, shape, dtype):
    array = mx.array(raw.view(NUMPY_TYPE[dtype]).reshape(shape))
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array
