"""LLVM IR text -> the same IR with a call before each memory access and a counter per basic block.

    msl_mem1/2(pointer, info, bytes)     before each access to device (1) or constant (2) memory
    msl_mem3(address, info, bytes)       before each access to threadgroup memory; returns its host address
    msl_blocks[k] += 1                   at the start of each basic block
    msl_block_lines[k]                   its line in the kernel's text
    msl_threadgroup                      the memory of the threadgroup
    msl_threadgroup_variables            offset in it and size of each threadgroup variable, then a 0
    msl_constants                        address and size of each program-scope constant, then a 0

Threadgroup memory has addresses of 32 bits from 0 on, as on an Apple GPU, so that arithmetic on its pointers
wraps where it would wrap there. (clang's name for such pointers is address space 271.)

The counters are incremented inline: counting costs a few percent. Instructions per block are known
here, so executions x instructions gives the operation counts, class by class.
"""

import functools
import re
from dataclasses import dataclass, field

from .translate import MSLError

# Bits of `info`, as runtime.cpp reads them: 0-15 alignment in bytes, then these, 32-63 source line.
WRITE, ATOMIC, READ = 1 << 16, 1 << 17, 1 << 18

CLASSES = {
    "fp": "fadd fsub fmul fneg frem",
    "fdiv": "fdiv",
    "int": "add sub mul",
    "idiv": "udiv sdiv urem srem",
    "bit": "and or xor shl lshr ashr",
    "cmp": "icmp fcmp select",
    "cvt": "fptrunc fpext sitofp uitofp fptosi fptoui",
    "branch": "br switch",
}
CLASS_OF = {instruction: name for name, instructions in CLASSES.items() for instruction in instructions.split()}
MATH_CALL = re.compile(r"@(?:llvm\.)?(exp2?|exp10|log2?|log10|sin|cos|tan|tanh|pow|sqrt|atan2?)f?[.(]")
INTEGER_CALL = re.compile(r"@llvm\.(smax|smin|umax|umin)")
BIT_CALL = re.compile(
    r"@llvm\.(maxnum|minnum|abs|fabs|copysign|floor|rint|trunc|ceil|round"
    r"|ctpop|ctlz|cttz|bswap|bitreverse|fshl|fshr)"
)

LABEL = re.compile(r"^([\w.$-]+):")
INSTRUCTION = re.compile(r"^  (?:%\S+ = )?(?:tail |musttail |notail )?(\w+)(?: (.*))?")
# The address spaces of msl.h: device, constant and threadgroup, by their number in the names of msl_mem1/2/3.
DEVICE, CONSTANT, THREADGROUP = 1, 2, 271
NUMBER = {DEVICE: 1, CONSTANT: 2, THREADGROUP: 3}
POINTER = re.compile(
    r'ptr addrspace\((\d+)\) (.+?)(?: syncscope\("[^"]*"\))?'
    r"(?: (?:unordered|monotonic|acquire|release|acq_rel|seq_cst))?$"
)
BRANCH = re.compile(r"  br i1 (%\S+), label (%\S+), label (%[^\s,]+)")
QUALIFIERS = re.compile(r"(?:(?:atomic|volatile|weak) )*")
VECTOR = re.compile(r"(?:\w+ )*<(\d+) x ")
RESULT_OR_CONDITION = re.compile(r"  (?:br i1 )?(%[^\s,]+)")
LOCATION = re.compile(r"!dbg (!\d+)")
MEMORY_CALL = re.compile(r"@llvm\.(memcpy|memmove|memset)\.[\w.]+\((.*?)\)(?:, !|$| #)")
MEMORY_INTRINSIC = re.compile(r" call void (@llvm\.mem(?:cpy|move|set)\.[\w.]+)\(")
MEMORY_INTRINSIC_DECLARED = re.compile(r"^declare void (@llvm\.mem(?:cpy|move|set)\.[\w.]+)\(", re.M)
IDENTIFIER = r'@(?:"[^"]*"|[\w.$-]+)'
THREADGROUP_VARIABLE = re.compile(rf"^({IDENTIFIER}) = .*addrspace\(271\) (?:global|constant) (.+)\n", re.M)
PROGRAM_CONSTANT = re.compile(rf"^({IDENTIFIER}) = .*addrspace\(2\) (?:global|constant) (.+)$", re.M)
# Threadgroup variables have addresses that far apart, so that an address tells its variable, also when it has
# left it; in the host they lie one behind the other. As in runtime.cpp.
THREADGROUP_SPACING = 1 << 20
# The runtime makes the counters unreadable to stop an endless loop, so they own whole pages (of any page
# size).
PAGE_BYTES = 65536


# ---- operands and types --------------------------------------------------------------------------


def split_operands(text):
    """Split at the commas that are outside all brackets and quotes: 'i32 1, <2 x i8> <i8 1, i8 2>' -> 2
    parts."""
    parts, depth, start, quoted = [], 0, 0, False
    for i, c in enumerate(text):
        if c == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif c in "([{<":
            depth += 1
        elif c in ")]}>":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


@dataclass(frozen=True)
class Type:
    """bits: what an access to it touches. alignment, in bytes: where the next one in an array or struct may
    start."""

    bits: int
    alignment: int

    @property
    def bytes(self):
        return (self.bits + 7) // 8

    @property
    def stride(self):
        return _round_up(self.bytes, self.alignment)


def _round_up(n, to):
    return (n + to - 1) // to * to


def _power_of_two_at_least(n):
    return 1 << max(0, n - 1).bit_length()


SCALAR_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}


def parse_type(text, named=None):
    """(Type, rest of the text after it) of the LLVM type that `text` starts with. `named`: {%name:
    definition}."""
    text = text.strip()
    if m := re.match(r"(half|bfloat|float|double|ptr)\b(?: addrspace\((\d+)\))?", text):
        bits = 32 if m[2] == str(THREADGROUP) else SCALAR_BITS[m[1]]
        return Type(bits, bits // 8), text[m.end() :]
    if m := re.match(r"i(\d+)\b", text):
        bits = int(m[1])
        return Type(bits, min(16, _power_of_two_at_least((bits + 7) // 8))), text[m.end() :]
    if m := re.match(r"([<\[])(\d+) x ", text):
        element, rest = parse_type(text[m.end() :], named)
        if m[1] == "[":
            return Type(8 * int(m[2]) * element.stride, element.alignment), _expect(rest, "]")
        bits = int(m[2]) * element.bits
        return Type(bits, _power_of_two_at_least((bits + 7) // 8)), _expect(rest, ">")
    if text.startswith(("{", "<{")):
        return _parse_struct(text, named)
    if m := re.match(r'%(?:"[^"]*"|[\w.$-]+)', text):
        if named and m[0] in named:
            return parse_type(named[m[0]], named)[0], text[m.end() :]
    raise MSLError(f"the simulator does not know the size of the LLVM type at '{text[:60]}'")


def _parse_struct(text, named):
    is_packed = text.startswith("<")
    rest = text[2 if is_packed else 1 :].lstrip()
    size, alignment = 0, 1
    while not rest.startswith("}"):
        field, rest = parse_type(rest, named)
        field_alignment = 1 if is_packed else field.alignment
        size = _round_up(size, field_alignment) + field.stride
        alignment = max(alignment, field_alignment)
        rest = rest.lstrip(" ,")
    rest = rest[1:]
    return Type(8 * _round_up(size, alignment), alignment), _expect(rest, ">") if is_packed else rest


def _expect(text, closing):
    text = text.lstrip()
    if not text.startswith(closing):
        raise MSLError(f"the simulator cannot read the LLVM type before '{text[:60]}'")
    return text[1:]


# ---- memory accesses -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Access:
    """One access to DEVICE, CONSTANT or THREADGROUP memory. operand: IR text of the pointer with its type;
    pointer: its value alone. n_bytes is IR text too: a number or a value, with its type."""

    space: int
    pointer: str
    n_bytes: str
    alignment: int
    flags: int
    operand: str = field(compare=False)


def accesses(line, named=None):
    """The accesses one IR instruction makes to device, constant or threadgroup memory."""
    m = INSTRUCTION.match(line) if "addrspace(" in line else None
    if not m:
        return []
    op, rest = m[1], m[2] or ""
    if op == "call":
        return _memory_call(rest)
    if op not in ("load", "store", "atomicrmw", "cmpxchg"):
        return []
    operands = split_operands(rest[QUALIFIERS.match(rest).end() :])
    alignment = next((int(o[6:]) for o in operands if o.startswith("align ")), 1)
    if op == "load":
        accessed, pointer, flags = operands[0], operands[1], READ
    elif op == "store":
        accessed, pointer, flags = operands[0], operands[1], WRITE
    else:
        pointer = operands[0] if op == "cmpxchg" else re.sub(r"^\w+ ", "", operands[0])
        accessed, flags = operands[1], READ | WRITE | ATOMIC
    if " atomic " in line:
        flags |= ATOMIC
    target = POINTER.match(pointer)
    if not target or int(target[1]) not in NUMBER:
        return []
    n_bytes = parse_type(accessed, named)[0].bytes
    if flags & ATOMIC:
        alignment = n_bytes
    operand = f"ptr addrspace({target[1]}) {target[2]}"
    return [Access(int(target[1]), target[2], f"i64 {n_bytes}", alignment, flags, operand)]


def _memory_call(rest):
    m = MEMORY_CALL.search(rest)
    if not m:
        return []
    arguments, found = split_operands(m[2]), []
    pointers = arguments[:1] if m[1] == "memset" else arguments[:2]
    for argument, flags in zip(pointers, (WRITE, READ)):
        target = re.match(r"ptr addrspace\((\d+)\)", argument)
        if target and int(target[1]) in NUMBER:
            # `ptr addrspace(1) noundef align 4 %p`: the value is the last word, unless it is a constant
            # expression
            value = re.search(r"((?:getelementptr|inttoptr) .*|\S+)$", argument)[1]
            alignment = re.search(r"\balign (\d+)", argument)
            found.append(
                Access(int(target[1]), value, arguments[2], int(alignment[1]) if alignment else 1, flags, argument)
            )
    return found


# ---- operation counts ----------------------------------------------------------------------------


def operation(line):
    """(class, how many) of one IR instruction: vectors count once per element. None for what is not
    counted."""
    m = INSTRUCTION.match(line)
    if not m or "!nosanitize" in line:
        return None
    op, rest = m[1], m[2] or ""
    vector = VECTOR.match(rest) if "<" in rest else None
    n = int(vector[1]) if vector else 1
    if op == "call":
        if "@llvm.fmuladd" in rest or "@llvm.fma." in rest:
            return "fma", n
        for pattern, name in ((MATH_CALL, "math"), (INTEGER_CALL, "int"), (BIT_CALL, "bit")):
            if pattern.search(rest):
                return name, n
        return None
    if op == "br" and not rest.startswith("i1"):
        return None  # an unconditional jump is an artefact of the text form
    return (CLASS_OF[op], n) if op in CLASS_OF else None


NO_CODE = re.compile(r"@llvm\.(lifetime|assume|experimental\.noalias)")


def count_instructions(ir):
    """How many instructions all functions of the module have."""
    n, in_function = 0, False
    for line in ir.split("\n"):
        if line.startswith(("define ", "}")):
            in_function = line.startswith("define ")
        n += in_function and bool(INSTRUCTION.match(line)) and not NO_CODE.search(line)
    return n


class DebugLocations:
    """Answers, from the !DILocation metadata, which line of the kernel an instruction comes from."""

    def __init__(self, ir):
        ir = ir[max(0, ir.rfind("\n}\n")) :]  # metadata follow the last function
        location = r"^(!\d+) = (?:distinct )?!DILocation\("
        self.line_and_scope = {
            m[1]: (int(m[2]), m[3]) for m in re.finditer(location + r"line: (\d+).*?scope: (!\d+)", ir, re.M)
        }
        self.inlined_at = dict(re.findall(location + r".*inlinedAt: (!\d+)", ir, re.M))
        scope = r"^(!\d+) = (?:distinct )?!DI(?:Subprogram|LexicalBlock|LexicalBlockFile)\("
        self.file_of_scope = dict(re.findall(scope + r".*?file: (!\d+)", ir, re.M))
        files = r'^(!\d+) = !DIFile\(filename: "%s"'
        self.kernel_files = set(re.findall(files % "kernel", ir, re.M))
        self.uncounted_files = set(re.findall(files % "msl-simd", ir, re.M))
        self._line_at, self._is_simulated_at = map(functools.cache, (self._line_at, self._is_simulated_at))

    def _file(self, at):
        return self.file_of_scope.get(self.line_and_scope.get(at, (0, ""))[1])

    def line(self, text):
        """Line in the kernel's text of the innermost call that is in it and has one; 0 if there is none."""
        m = LOCATION.search(text)
        return self._line_at(m[1]) if m else 0

    def _line_at(self, at):
        while at is not None:
            line, _ = self.line_and_scope.get(at, (0, ""))
            if line and self._file(at) in self.kernel_files:
                return line
            at = self.inlined_at.get(at)
        return 0

    def is_simulated(self, text):
        """Whether the instruction belongs to the stand-in for a simdgroup function, which a GPU has in
        hardware."""
        m = LOCATION.search(text)
        return bool(m) and self._is_simulated_at(m[1])

    def _is_simulated_at(self, at):
        while at is not None:  # also what the stand-in calls, as max() in simd_max()
            if self._file(at) in self.uncounted_files:
                return True
            at = self.inlined_at.get(at)
        return False


def _sanitizer_conditions(lines):
    """Names of the i1 values that only serve array-bounds and shift checks."""
    label, traps = "", set()
    for line in lines:
        if m := LABEL.match(line):
            label = m[1]
        if "@llvm.ubsantrap" in line or "@__ubsan_handle" in line:
            traps.add("%" + label)
    branches = (BRANCH.match(line) for line in lines)
    return {m[1] for m in branches if m and traps & {m[2], m[3]}}


def prepare(ir):
    """Unoptimised IR whose threadgroup variables are declared and not defined: an optimiser must not think
    that it sees all that is written to them, and their bounds are checked by msl_mem3."""
    head, functions, named = _parts(ir)
    head = re.sub(r"^@llvm\.(?:compiler\.)?used = .*\n", "", head, flags=re.M)

    def declaration(m):
        rest = parse_type(m[2], named)[1]
        kind = m[2].removesuffix(rest)
        return f"{m[1]} = external addrspace({THREADGROUP}) global {kind}, align {_alignment(rest)}\n"

    return THREADGROUP_VARIABLE.sub(declaration, head) + functions


def _parts(ir):
    """(what comes before the functions, the rest, {%name: definition} of the types that have names)."""
    start = re.search(r"^define ", ir, re.M).start()
    head, functions = ir[:start], ir[start:]
    return head, functions, dict(re.findall(r'^(%(?:"[^"]*"|[\w.$-]+)) = type (.+)$', head, re.M))


def _alignment(attributes):
    return int(re.search(r", align (\d+)", attributes)[1])


# ---- the whole module ----------------------------------------------------------------------------


def instrument(ir):
    """Returns (instrumented IR, {"blocks": [{class: instructions}, ...],
    "threadgroup_variables": [name, ...], "constants": [name, ...]})."""
    where = DebugLocations(ir)
    head, functions, named = _parts(ir)
    constants = PROGRAM_CONSTANT.findall(head)
    variables = _threadgroup_variables(head, named)
    head = THREADGROUP_VARIABLE.sub("", head)
    lines, out = _with_addresses(head + functions, variables).split("\n"), []
    blocks, block_lines = [], []
    in_function = at_block_start = False
    uncounted = set()
    for i, line in enumerate(lines):
        if line.startswith("define "):
            in_function = at_block_start = True
            uncounted = _sanitizer_conditions(lines[i : lines.index("}", i)])
            out.append(line)
            continue
        if line.startswith("}"):
            in_function = False
        if not in_function:
            out.append(line)
            continue
        if LABEL.match(line):
            at_block_start = True
            out.append(line)
            continue
        is_code = line.strip() and not line.lstrip().startswith(("#dbg", ";"))
        if at_block_start and is_code and " = phi " not in line:
            at_block_start = False
            out += _count_block(len(blocks))
            blocks.append({})
            block_lines.append(0)
        if "@llvm.ubsantrap" in line:
            out.append(f"  call void @msl_trap(i32 {where.line(line)})")
            continue
        if blocks and not block_lines[-1] and not at_block_start:
            block_lines[-1] = where.line(line)
        value = RESULT_OR_CONDITION.match(line)
        counted = None if value and value[1] in uncounted else operation(line)
        if counted and not where.is_simulated(line):
            blocks[-1][counted[0]] = blocks[-1].get(counted[0], 0) + counted[1]
        for a in accesses(line, named):
            line = _check_access(a, where.line(line), line, out)
        out.append(line)
    constants = [(name, parse_type(text, named)[0].bytes) for name, text in constants]
    out += _tables(block_lines, variables, constants)
    ir = "\n".join(out)
    info = {
        "blocks": blocks,
        "threadgroup_variables": [_demangled(v.name) for v in variables],
        "constants": [_demangled(name) for name, _ in constants],
    }
    return "\n".join([ir, *_missing_declarations(ir)]), info


def _demangled(name):
    """The last part of a mangled name, which is that of the variable: @_ZZ4loopE3sum_0 -> sum."""
    for m in reversed(list(re.finditer(r"\d+", name))):
        end = m.end() + int(m[0])
        if m.end() < end <= len(name) and re.fullmatch(r"(?:_\d+|__\d+_)?", name[end:].rstrip('"')):
            return name[m.end() : end]
    return name.strip('@"')


def _check_access(access, line_number, line, out):
    """Appends the call that checks the access; returns the instruction, in which a threadgroup pointer has
    become one of the host."""
    info = min(access.alignment, 128) | access.flags | line_number << 32
    if access.space != THREADGROUP:
        name = f"@msl_mem{NUMBER[access.space]}"
        out.append(f"  call void {name}({access.operand}, i64 {info}, {access.n_bytes})")
        return line
    k = len(out)
    out.append(f"  %msl.address{k} = ptrtoint ptr addrspace({THREADGROUP}) {access.pointer} to i32")
    out.append(f"  %msl.host{k} = call ptr @msl_mem3(i32 %msl.address{k}, i64 {info}, {access.n_bytes})")
    # of memcpy and the like, the name has the address spaces of the pointers
    return line.replace(access.operand, f"ptr %msl.host{k}", 1).replace(f".p{THREADGROUP}", ".p0", 1)


def _missing_declarations(ir):
    """Of the variants of memcpy and the like that _check_access made."""
    if f".p{THREADGROUP}" not in ir:
        return
    for name in sorted(set(MEMORY_INTRINSIC.findall(ir)) - set(MEMORY_INTRINSIC_DECLARED.findall(ir))):
        bits = name.rsplit(".", 1)[1]
        pointers = [f"ptr addrspace({space})" for space in re.findall(r"\.p(\d+)", name)]
        yield f"declare void {name}({', '.join(pointers + ['i8'] * ('memset' in name))}, {bits}, i1 immarg)"


@dataclass(frozen=True)
class _Variable:
    """A threadgroup variable: its name, and where it lies in msl_threadgroup."""

    name: str
    offset: int
    n_bytes: int


def _threadgroup_variables(head, named):
    variables, end = [], 0
    for name, definition in THREADGROUP_VARIABLE.findall(head):
        kind, rest = parse_type(definition, named)
        offset = _round_up(end, _alignment(rest))
        variables.append(_Variable(name, offset, kind.bytes))
        end = offset + kind.bytes
    return variables


def _with_addresses(ir, variables):
    """The IR with addresses in place of the names of the threadgroup variables."""
    if not variables:
        return ir
    address = {v.name: k * THREADGROUP_SPACING for k, v in enumerate(variables)}
    return re.sub(
        f"(?:{'|'.join(map(re.escape, address))})" + r"(?![\w.$-])",
        lambda m: f"inttoptr (i32 {address[m[0]]} to ptr addrspace({THREADGROUP}))",
        ir,
    )


def _count_block(k):
    slot = f"ptr getelementptr inbounds (i64, ptr @msl_blocks, i64 {k})"
    return [
        f"  %msl.count{k} = load i64, {slot}, align 8",
        f"  %msl.plus{k} = add i64 %msl.count{k}, 1",
        f"  store i64 %msl.plus{k}, {slot}, align 8",
    ]


def _tables(block_lines, variables, constants):
    memory_bytes = variables[-1].offset + variables[-1].n_bytes if variables else 0
    line_numbers = ", ".join(f"i32 {n}" for n in [*block_lines, 0])
    n_counters = _round_up(len(block_lines) + 1, PAGE_BYTES // 8)
    return [
        "declare void @msl_trap(i32)",
        *(f"declare void @msl_mem{NUMBER[s]}(ptr addrspace({s}), i64, i64)" for s in (DEVICE, CONSTANT)),
        "declare ptr @msl_mem3(i32, i64, i64)",
        *_spans("msl_threadgroup_variables", [(v.offset, v.n_bytes) for v in variables]),
        *_spans("msl_constants", [(f"ptrtoint (ptr addrspace({CONSTANT}) {name} to i64)", n) for name, n in constants]),
        f"@msl_threadgroup = global [{memory_bytes + 1} x i8] zeroinitializer, align 128",
        f"@msl_blocks = global [{n_counters} x i64] zeroinitializer, align {PAGE_BYTES}",
        f"@msl_block_lines = constant [{len(block_lines) + 1} x i32] [{line_numbers}]",
    ]


def _spans(name, spans):
    numbers = ", ".join(f"i64 {n}" for span in [*spans, (0,)] for n in span)
    return [f"@{name} = global [{2 * len(spans) + 1} x i64] [{numbers}]"]
