"""C++ text -> instrumented shared object, through clang and LLVM IR, kept in a cache directory.

The compiler is the clang inside `pip install ziglang`, or $METALSIM_CLANG (a clang >= 20 with lld next to
it). The cache is $METALSIM_CACHE or a directory of this user under the system's temporary directory. A file
appears there complete or not at all, so any number of processes may share it.
"""

import ctypes
import functools
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from .instrument import count_instructions, instrument, prepare
from .pointers import check_pointers
from .translate import MSLError

HERE = Path(__file__).resolve().parent
TARGETS = {"x86_64": ["--target=x86_64-linux-gnu", "-march=x86-64-v3"], "aarch64": ["--target=aarch64-linux-gnu"]}
FREESTANDING = [
    "-fPIC",
    "-ffreestanding",
    "-nostdinc",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
]
LANGUAGE = ["-x", "c++", "-std=c++14"]
LANGUAGE_FLAGS = [
    *FREESTANDING,
    "-O2",
    "-fno-threadsafe-statics",
    # one GPU thread executes scalar code: keep the counts close to that
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-mllvm",
    "-disable-loop-idiom-all",
    # arithmetic as in MSL's safe math mode, with half and bfloat rounded after every operation
    "-fno-math-errno",
    "-ffp-contract=on",
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
    "-flax-vector-conversions=none",
    "-Wno-c++17-extensions",
    "-Wno-c++20-extensions",
    "-Wno-duplicate-decl-specifier",
    "-Wno-unknown-pragmas",
    "-Wno-pass-failed",
    "-fno-caret-diagnostics",
]
KERNEL_FLAGS = [
    *LANGUAGE_FLAGS,
    "-gline-tables-only",
    # undefined behaviour must show: no loop is assumed to end, no stack frame jumps over the guard page
    "-ftrivial-auto-var-init=pattern",
    "-fsanitize=bounds,shift-exponent,integer-divide-by-zero",
    "-fstrict-flex-arrays=3",  # bounds also of an array that ends a struct
    "-fno-sanitize-recover=all",
    "-fno-finite-loops",
    "-fstack-clash-protection",
    "-fwrapv-pointer",
    "-Werror=uninitialized",
    "-Werror=sometimes-uninitialized",
    "-Werror=return-type",
]
# A simdgroup function is one call of a function without a body, as on a GPU it is one instruction.
CODE_SIZE_FLAGS = [*LANGUAGE, *LANGUAGE_FLAGS, "-g0", "-DMSL_CODE_SIZE"]


@functools.cache
def _toolchain():
    """(compiler command with target, linker command, identity for the cache key)."""
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in TARGETS:
        raise RuntimeError(
            f"metalsim runs on Linux on {' or '.join(TARGETS)}; this is {platform.system()} "
            f"on {machine}. On a Mac use mx.fast.metal_kernel itself."
        )
    target = TARGETS[machine]
    clang = os.environ.get("METALSIM_CLANG")
    if clang:
        linker = [clang, *target, "-shared", "-nostdlib"]
        if shutil.which("ld.lld"):
            linker.append("-fuse-ld=lld")
        identity = clang + subprocess.run([clang, "--version"], capture_output=True, text=True, check=True).stdout
        return [clang, *target], linker, identity
    try:
        import ziglang
    except ImportError:
        raise RuntimeError(
            "metalsim needs a compiler: pip install ziglang==0.17.1, or set METALSIM_CLANG to a clang >= 20"
        ) from None
    zig = Path(ziglang.__file__).with_name("zig")
    # `zig c++` would build its own C++ library first (a minute); the two subcommands used here do not
    linker = [str(zig), "ld.lld", "-shared", "--hash-style=gnu"]
    return [str(zig), "clang", *target], linker, "zig " + version("ziglang")


@functools.cache
def cache_directory():
    """The directory for compiled kernels; created, and refused if it belongs to somebody else."""
    directory = os.environ.get("METALSIM_CACHE")
    directory = Path(directory) if directory else Path(tempfile.gettempdir()) / f"metalsim-{os.getuid()}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise RuntimeError(f"{directory} belongs to another user: set METALSIM_CACHE to a directory of yours")
    return directory


def _run(command, what):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MSLError(f"{what} failed:\n" + "\n".join(_messages(done.stderr)[:20]))


def _messages(stderr):
    """clang's errors and notes. An error inside msl.h becomes one of the line of the kernel that calls it."""
    messages = []
    for error in re.split(r"^(?=.*error:)", stderr, flags=re.M):
        lines = [line for line in error.splitlines() if "error:" in line or "note:" in line]
        callers = [line.partition(": note:")[0] for line in lines if line.startswith("kernel:")]
        if callers and not lines[0].startswith("kernel:"):
            lines = [f"{callers[0]}: {lines[0][lines[0].index('error:') :]}"]
        messages += lines
    return messages or stderr.splitlines()


def _key(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


@functools.cache
def runtime():
    """The scheduler and checker, loaded globally so that the symbols of kernels resolve against it."""
    compiler, linker, identity = _toolchain()
    source = HERE / "runtime.cpp"
    key = _key(source.read_text(), Path(__file__).read_text(), identity)
    shared = cache_directory() / f"runtime-{key}.so"
    if not shared.exists():
        with tempfile.TemporaryDirectory(dir=cache_directory()) as directory:
            obj, linked = f"{directory}/runtime.o", f"{directory}/runtime.so"
            _run(
                [*compiler, *FREESTANDING, "-O2", "-fvisibility=hidden", "-c", "-o", obj, str(source)],
                "building the runtime",
            )
            _run([*linker, "-o", linked, obj], "linking the runtime")
            os.replace(linked, shared)
    return ctypes.CDLL(str(shared), mode=ctypes.RTLD_GLOBAL)


def _unit(cpp, entry):
    return f'#include "msl.h"\n#line 1 "kernel"\n{cpp}\n#line 1 "entry"\n{entry}\n'


@functools.cache
def _own_sources():
    names = ("msl.h", "instrument.py", "pointers.py", "compile.py")
    return "".join((HERE / name).read_text() for name in names)


class CodeSize(NamedTuple):
    """instructions: of LLVM IR after -O2; seconds: CPU time clang took to get there, when it did."""

    instructions: int
    seconds: float


def code_size(cpp, entry, extra_flags=()):
    """CodeSize of one kernel without checks and counters; cpp and entry as for compile_kernel."""
    compiler, _, identity = _toolchain()
    text = _unit(cpp, entry)
    known = cache_directory() / f"{_key(text, _own_sources(), identity, 'size', *extra_flags)}.size"
    if not known.exists():
        with tempfile.TemporaryDirectory(dir=cache_directory()) as name:
            directory = Path(name)
            (directory / "kernel.cpp").write_text(text)
            ir = directory / "kernel.ll"
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            _run(
                [
                    *compiler,
                    *CODE_SIZE_FLAGS,
                    *extra_flags,
                    "-I",
                    str(HERE),
                    "-S",
                    "-emit-llvm",
                    "-o",
                    str(ir),
                    str(directory / "kernel.cpp"),
                ],
                "MSL compilation",
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            size = [count_instructions(ir.read_text()), round(seconds, 3)]
            (directory / "size").write_text(json.dumps(size))
            os.replace(directory / "size", known)
    return CodeSize(*json.loads(known.read_text()))


def compile_kernel(cpp, entry, extra_flags=()):
    """Compile one kernel. cpp: translated MSL; entry: the C++ function through which the runtime calls the
    kernel.

    Returns (path of the shared object, what instrument() says about it). Raises MSLError with clang's
    messages.
    """
    compiler, linker, identity = _toolchain()
    text = _unit(cpp, entry)
    key = _key(text, _own_sources(), identity, *extra_flags)
    shared, description = cache_directory() / f"{key}.so", cache_directory() / f"{key}.json"
    if not shared.exists():  # the shared object is put in place last
        with tempfile.TemporaryDirectory(dir=cache_directory()) as name:
            directory = Path(name)
            (directory / "kernel.cpp").write_text(text)
            ir = directory / "kernel.ll"
            to_ir = [*compiler, *KERNEL_FLAGS, *extra_flags, "-S", "-emit-llvm", "-o", str(ir)]
            _run(
                [*to_ir, *LANGUAGE, "-I", str(HERE), "-Xclang", "-disable-llvm-passes", str(directory / "kernel.cpp")],
                "MSL compilation",
            )
            (directory / "checked.ll").write_text(check_pointers(prepare(ir.read_text())))
            _run([*to_ir, str(directory / "checked.ll")], "optimisation")
            instrumented, info = instrument(ir.read_text())
            ir.write_text(instrumented)
            (directory / "kernel.json").write_text(json.dumps(info))
            # Code generation only: an optimiser would move or merge the counters. -O0 takes a third of -O1's
            # time, and the kernels run as fast: what they wait for is the runtime.
            _run(
                [
                    *compiler,
                    "-O0",
                    "-fPIC",
                    "-Wno-override-module",
                    "-Xclang",
                    "-disable-llvm-passes",
                    "-c",
                    "-o",
                    str(directory / "kernel.o"),
                    str(ir),
                ],
                "code generation",
            )
            _run([*linker, "-o", str(directory / "kernel.so"), str(directory / "kernel.o")], "linking")
            os.replace(directory / "kernel.json", description)
            os.replace(directory / "kernel.so", shared)
    return shared, json.loads(description.read_text())
