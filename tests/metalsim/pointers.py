"""Unoptimised LLVM IR text -> the same IR with calls where pointers are computed and compared.

    msl_arithmetic1/2/3(from, to, line)    after the pointer `to` is made from `from`
    msl_comparison1/2/3(a, b, line)        before a <, <=, > or >= b; 1 is device, 2 constant, 3 threadgroup

Each getelementptr here is one that the source asks for; an optimiser makes others, which may point anywhere.
Left out is what only serves a load or a store, as in a[i]: accesses are checked.
"""

import re
from collections import Counter

from .instrument import IDENTIFIER, NUMBER, DebugLocations, split_operands

FLAGS = r"(?:(?:inbounds|nuw|nusw) )*"
ARITHMETIC = re.compile(rf"^  (%\S+) = getelementptr {FLAGS}(.+)", re.M)
CONSTANT = re.compile(rf"getelementptr {FLAGS}\(")
COMPARISON = re.compile(r"  %\S+ = icmp (?:samesign )?u[lg][te] (ptr addrspace\((\d+)\) .+)")
POINTER = re.compile(r"ptr addrspace\((\d+)\)")
ACCESS = re.compile(r"^  (?:%\S+ = load|store) .*ptr addrspace\(\d+\) (\S+), align", re.M)
# They touch no memory of the kernel, so that an optimiser may move its loads and stores across them.
DECLARATION = (
    "declare void @msl_{}(ptr addrspace({}), ptr addrspace({}), i32) "
    "nounwind willreturn memory(inaccessiblemem: readwrite)"
)


def check_pointers(ir):
    """The IR with those calls. A constant that a phi or select chooses is not looked at."""
    where, out = DebugLocations(ir), []
    for function in re.split(r"^(?=define )", ir, flags=re.M):
        kept = _kept(function)
        for line in function.split("\n"):
            n = where.line(line) if "ptr addrspace(" in line else 0
            if not n or line.lstrip().startswith("#"):  # what msl.h does is not the kernel's
                out.append(line)
                continue
            if " = phi " not in line and " = select " not in line:
                out += (_call("arithmetic", base, expression, n) for base, expression in _constants(line))
            if m := COMPARISON.match(line):
                a, b = split_operands(m[1])[:2]
                out.append(_call("comparison", a, f"ptr addrspace({m[2]}) {b}", n))
            out.append(line)
            m = ARITHMETIC.match(line)
            if m and m[1] in kept:
                out.append(_call("arithmetic", kept[m[1]], f"{POINTER.match(kept[m[1]])[0]} {m[1]}", n))
    out += (
        DECLARATION.format(f"{what}{k}", space, space)
        for what in ("arithmetic", "comparison")
        for space, k in NUMBER.items()
    )
    return "\n".join(out)


def _kept(function):
    """{pointer: the one it is made from, with its type}, without what only serves loads and stores."""
    made = {}
    for name, operands in ARITHMETIC.findall(function):
        base = split_operands(operands)[1]
        space = POINTER.match(base)
        if space and int(space[1]) in NUMBER:
            made[name] = base
    if not made:
        return made
    mentioned, accessed = Counter(re.findall(r"%[\w.]+", function)), Counter(ACCESS.findall(function))
    return {name: base for name, base in made.items() if mentioned[name] > 1 + accessed[name]}


def _call(what, a, b, line):
    return f"  call void @msl_{what}{NUMBER[int(POINTER.match(a)[1])]}({a}, {b}, i32 {line})"


def _constants(line):
    """(variable, address made from it), with types, of the constant pointer arithmetic in an instruction."""
    end = 0
    while m := CONSTANT.search(line, end):
        end = _closing(line, m.end() - 1) + 1
        expression = line[m.start() : end]
        base = re.search(rf"(ptr addrspace\((\d+)\)) ({IDENTIFIER})", expression)
        if base and int(base[2]) in NUMBER:
            yield f"{base[1]} {base[3]}", f"{base[1]} {expression}"


def _closing(text, start):
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(text)
