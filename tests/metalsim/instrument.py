"""LLVM IR text -> the same IR with a call before each memory access and a counter per basic block.

    msl_mem1/2/3(pointer, info, bytes)   before each access to device (1), constant (2) or threadgroup (3)
    msl_blocks[k] += 1                   at the start of each basic block
    msl_block_lines[k]                   its line in the kernel's text
    msl_threadgroup_variables            address and size of each threadgroup variable, then a 0

The counters are incremented inline: counting costs a few percent. Instructions per block are known
here, so executions x instructions gives the operation counts, class by class.
"""
import re
from dataclasses import dataclass

from .translate import MSLError

# Bits of `info`, as runtime.cpp reads them: 0-15 alignment in bytes, then these, 32-63 source line.
WRITE, ATOMIC, READ = 1 << 16, 1 << 17, 1 << 18

CLASSES = {
    "fp": "fadd fsub fmul fneg frem", "fdiv": "fdiv", "int": "add sub mul", "idiv": "udiv sdiv urem srem",
    "bit": "and or xor shl lshr ashr", "cmp": "icmp fcmp select",
    "cvt": "fptrunc fpext sitofp uitofp fptosi fptoui", "branch": "br switch",
}
CLASS_OF = {instruction: name for name, instructions in CLASSES.items()
            for instruction in instructions.split()}
MATH_CALL = re.compile(r"@(?:llvm\.)?(exp2?|exp10|log2?|log10|sin|cos|tan|tanh|pow|sqrt|atan2?)f?[.(]")
INTEGER_CALL = re.compile(r"@llvm\.(smax|smin|umax|umin)")
BIT_CALL = re.compile(r"@llvm\.(maxnum|minnum|abs|fabs|copysign|floor|rint|trunc|ceil|round"
                      r"|ctpop|ctlz|cttz|bswap|bitreverse|fshl|fshr)")

LABEL = re.compile(r"^([\w.$-]+):")
INSTRUCTION = re.compile(r"^  (?:%\S+ = )?(?:tail |musttail |notail )?(\w+)(?: (.*))?")
POINTER = re.compile(r'ptr addrspace\((\d)\) (.+?)(?: syncscope\("[^"]*"\))?'
                     r"(?: (?:unordered|monotonic|acquire|release|acq_rel|seq_cst))?$")
MEMORY_CALL = re.compile(r"@llvm\.(memcpy|memmove|memset)\.[\w.]+\((.*?)\)(?:, !|$| #)")
THREADGROUP_VARIABLE = re.compile(r"^(@\S+) = .*addrspace\(3\) (?:global|constant) (.+)$")
NO_INITIALISER = re.compile(r" (?:zeroinitializer|undef|poison|null|false|0|0\.0+e\+00|0xH0000|0xR0000)"
                            r"(?=,|$)")
# An overrun of one variable must not land in the next: every threadgroup variable is followed by this many
# bytes.
THREADGROUP_GAP_BYTES = 64
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
    if m := re.match(r"(half|bfloat|float|double|ptr)\b(?: addrspace\(\d+\))?", text):
        bits = SCALAR_BITS[m[1]]
        return Type(bits, bits // 8), text[m.end():]
    if m := re.match(r"i(\d+)\b", text):
        bits = int(m[1])
        return Type(bits, min(16, _power_of_two_at_least((bits + 7) // 8))), text[m.end():]
    if m := re.match(r"([<\[])(\d+) x ", text):
        element, rest = parse_type(text[m.end():], named)
        if m[1] == "[":
            return Type(8 * int(m[2]) * element.stride, element.alignment), _expect(rest, "]")
        bits = int(m[2]) * element.bits
        return Type(bits, _power_of_two_at_least((bits + 7) // 8)), _expect(rest, ">")
    if text.startswith(("{", "<{")):
        return _parse_struct(text, named)
    if m := re.match(r'%(?:"[^"]*"|[\w.$-]+)', text):
        if named and m[0] in named:
            return parse_type(named[m[0]], named)[0], text[m.end():]
    raise MSLError(f"the simulator does not know the size of the LLVM type at '{text[:60]}'")


def _parse_struct(text, named):
    is_packed = text.startswith("<")
    rest = text[2 if is_packed else 1:].lstrip()
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
    """One access to device (1), constant (2) or threadgroup (3) memory. n_bytes is IR text: a number or a
    value."""
    space: int
    pointer: str
    n_bytes: str
    alignment: int
    flags: int


def accesses(line, named=None):
    """The accesses one IR instruction makes to device, constant or threadgroup memory."""
    m = INSTRUCTION.match(line)
    if not m or "addrspace(" not in line:
        return []
    op, rest = m[1], m[2] or ""
    if op == "call":
        return _memory_call(rest)
    if op not in ("load", "store", "atomicrmw", "cmpxchg"):
        return []
    rest = re.sub(r"^(?:(?:atomic|volatile|weak) )*", "", rest)
    operands = split_operands(rest)
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
    if not target or target[1] not in "123":
        return []
    n_bytes = parse_type(accessed, named)[0].bytes
    if flags & ATOMIC:
        alignment = n_bytes
    return [Access(int(target[1]), target[2], str(n_bytes), alignment, flags)]


def _memory_call(rest):
    m = MEMORY_CALL.search(rest)
    if not m:
        return []
    arguments, found = split_operands(m[2]), []
    n_bytes = arguments[2].split()[-1]
    pointers = arguments[:1] if m[1] == "memset" else arguments[:2]
    for argument, flags in zip(pointers, (WRITE, READ)):
        target = re.match(r"ptr addrspace\(([123])\)", argument)
        if target:
            # `ptr addrspace(1) noundef align 4 %p`: the value is the last word, unless it is a constant
            # expression
            value = re.search(r"(getelementptr .*|\S+)$", argument)[1]
            alignment = re.search(r"\balign (\d+)", argument)
            found.append(Access(int(target[1]), value, n_bytes, int(alignment[1]) if alignment else 1, flags))
    return found


# ---- operation counts ----------------------------------------------------------------------------

def operation(line):
    """(class, how many) of one IR instruction: vectors count once per element. None for what is not
    counted."""
    m = INSTRUCTION.match(line)
    if not m or "!nosanitize" in line:
        return None
    op, rest = m[1], m[2] or ""
    vector = re.match(r"(?:\w+ )*<(\d+) x ", rest)
    n = int(vector[1]) if vector else 1
    if op == "call":
        if "@llvm.fmuladd" in rest or "@llvm.fma." in rest:
            return "fma", n
        for pattern, name in ((MATH_CALL, "math"), (INTEGER_CALL, "int"), (BIT_CALL, "bit")):
            if pattern.search(rest):
                return name, n
        return None
    if op == "br" and not rest.startswith("i1"):
        return None                                 # an unconditional jump is an artefact of the text form
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
        location = r"^(!\d+) = (?:distinct )?!DILocation\("
        self.line_and_scope = {m[1]: (int(m[2]), m[3])
                               for m in re.finditer(location + r"line: (\d+).*?scope: (!\d+)", ir, re.M)}
        self.inlined_at = dict(re.findall(location + r".*inlinedAt: (!\d+)", ir, re.M))
        scope = r"^(!\d+) = (?:distinct )?!DI(?:Subprogram|LexicalBlock|LexicalBlockFile)\("
        self.file_of_scope = dict(re.findall(scope + r".*?file: (!\d+)", ir, re.M))
        files = r'^(!\d+) = !DIFile\(filename: "%s"'
        self.kernel_files = set(re.findall(files % "kernel", ir, re.M))
        self.uncounted_files = set(re.findall(files % "msl-simd", ir, re.M))

    def _file(self, at):
        return self.file_of_scope.get(self.line_and_scope.get(at, (0, ""))[1])

    def line(self, text):
        """Line in the kernel's text of the innermost call that is in it; 0 if there is none."""
        m = re.search(r"!dbg (!\d+)", text)
        at = m[1] if m else None
        while at in self.inlined_at and self._file(at) not in self.kernel_files:
            at = self.inlined_at[at]
        return self.line_and_scope.get(at, (0, ""))[0]

    def is_simulated(self, text):
        """Whether the instruction belongs to the stand-in for a simdgroup function, which a GPU has in
        hardware."""
        m = re.search(r"!dbg (!\d+)", text)
        at = m[1] if m else None
        while at is not None:                       # also what the stand-in calls, as max() in simd_max()
            if self._file(at) in self.uncounted_files:
                return True
            at = self.inlined_at.get(at)
        return False


def _sanitizer_conditions(lines, start):
    """Names of the i1 values that only serve array-bounds and shift checks, in the function that begins at
    start."""
    end = lines.index("}", start)
    label, traps = "", set()
    for line in lines[start:end]:
        if m := LABEL.match(line):
            label = m[1]
        if "@llvm.ubsantrap" in line or "@__ubsan_handle" in line:
            traps.add("%" + label)
    branches = (re.match(r"  br i1 (%\S+), label (%\S+), label (%[^\s,]+)", line)
                for line in lines[start:end])
    return {m[1] for m in branches if m and traps & {m[2], m[3]}}


# ---- the whole module ----------------------------------------------------------------------------

def instrument(ir):
    """Returns (instrumented IR, {"blocks": [{class: instructions}, ...], "n_threadgroup_variables": int})."""
    lines, out = ir.split("\n"), []
    where = DebugLocations(ir)
    named = dict(re.findall(r'^(%(?:"[^"]*"|[\w.$-]+)) = type (.+)$', ir, re.M))
    blocks, block_lines, threadgroup_variables = [], [], []
    in_function = at_block_start = False
    conditions = set()
    for i, line in enumerate(lines):
        if m := THREADGROUP_VARIABLE.match(line):
            kind, definition = _widen_threadgroup_variable(m[1], m[2], named)
            threadgroup_variables.append((m[1], kind))
            out.append(definition)
            continue
        if line.startswith("define "):
            in_function = at_block_start = True
            conditions = _sanitizer_conditions(lines, i)
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
        value = re.match(r"  (?:br i1 )?(%[^\s,]+)", line)
        counted = None if value and value[1] in conditions else operation(line)
        if counted and not where.is_simulated(line):
            blocks[-1][counted[0]] = blocks[-1].get(counted[0], 0) + counted[1]
        for a in accesses(line, named):
            info = min(a.alignment, 128) | a.flags | where.line(line) << 32
            out.append(f"  call void @msl_mem{a.space}(ptr addrspace({a.space}) {a.pointer}, "
                       f"i64 {info}, i64 {a.n_bytes})")
        out.append(line)
    out += _tables(block_lines, threadgroup_variables)
    return "\n".join(out), {"blocks": blocks, "n_threadgroup_variables": len(threadgroup_variables)}


def _widen_threadgroup_variable(name, text, named):
    """(type, definition with a gap after the variable); text is `[64 x float] zeroinitializer, align 4`."""
    after_type = parse_type(text, named)[1]
    kind = text[:len(text) - len(after_type)]
    initialiser = NO_INITIALISER.match(after_type)
    if not initialiser:
        raise MSLError(f"the simulator cannot read the threadgroup variable {name} = {text}")
    attributes = re.sub(r", comdat(\([^)]*\))?", "", after_type[initialiser.end():])
    return kind, (f"{name} = internal addrspace(3) global "
                  f"{{ {kind}, [{THREADGROUP_GAP_BYTES} x i8] }} zeroinitializer{attributes}")


def _count_block(k):
    slot = f"ptr getelementptr inbounds (i64, ptr @msl_blocks, i64 {k})"
    return [f"  %msl.count{k} = load i64, {slot}, align 8",
            f"  %msl.plus{k} = add i64 %msl.count{k}, 1",
            f"  store i64 %msl.plus{k}, {slot}, align 8"]


def _tables(block_lines, threadgroup_variables):
    variables = []
    for name, kind in threadgroup_variables:
        variables.append(f"i64 ptrtoint (ptr addrspacecast (ptr addrspace(3) {name} to ptr) to i64)")
        variables.append(f"i64 ptrtoint (ptr getelementptr ({kind}, ptr null, i64 1) to i64)")
    numbers = ", ".join([*variables, "i64 0"])
    line_numbers = ", ".join(f"i32 {n}" for n in [*block_lines, 0])
    n_counters = _round_up(len(block_lines) + 1, PAGE_BYTES // 8)
    return ["declare void @msl_trap(i32)",
            *(f"declare void @msl_mem{s}(ptr addrspace({s}), i64, i64)" for s in (1, 2, 3)),
            f"@msl_blocks = global [{n_counters} x i64] zeroinitializer, align {PAGE_BYTES}",
            f"@msl_block_lines = constant [{len(block_lines) + 1} x i32] [{line_numbers}]",
            f"@msl_threadgroup_variables = global [{len(variables) + 1} x i64] [{numbers}]"]
