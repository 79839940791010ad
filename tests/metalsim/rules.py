"""What Apple's front end refuses and clang, taking the text for C++, does not.

    scopes, declarations = scopes_of(tokens, kernels)
    for token, text in violations(tokens, scopes, declarations, directives, types): ...

Heuristics over tokens, like all of translate.py: they know scopes, not types.
"""

import re
from dataclasses import dataclass
from pathlib import Path

TYPES = {"struct", "class", "union", "enum"}
NO_VARIABLE = {*TYPES, "using", "typedef", "namespace", "static_assert", "friend", "template", "extern"}
IN_FUNCTIONS = ("function", "block")
# Functions of the Metal standard library that a text may want to define itself.
STANDARD_FUNCTIONS = set(
    """
    abs absdiff acos acosh addsat all any as_type asin asinh atan atan2 atanh ceil clamp clz copysign cos
    cosh cospi cross ctz determinant distance distance_squared divide dot exp exp10 exp2 extract_bits fabs
    faceforward fdim floor fma fmax fmax3 fmedian3 fmin fmin3 fmod fract frexp hadd ilogb insert_bits
    isfinite isinf isnan isnormal isordered isunordered ldexp length length_squared log log10 log2 mad24
    madhi madsat max max3 median3 min min3 mix modf mul24 mulhi nextafter normalize popcount pow powr
    reflect refract reverse_bits rhadd rint rotate round rsqrt saturate select sign signbit
    simdgroup_barrier sin sincos sinh sinpi smoothstep sqrt step subsat tan tanh tanpi threadgroup_barrier
    transpose trunc""".split()
)
STANDARD_FUNCTION_PREFIX = re.compile(r"(simd|quad)_")  # these take no types of 64 bits and no bool
WITHOUT_SIMD = {"long", "ulong", "int64_t", "uint64_t", "size_t", "ptrdiff_t", "bool"}
CONSTANT_MACRO = re.compile(r"\s*#\s*define\s+(\w+)\b.*\bconstant\b", re.S)
# A "[" behind one of these begins an expression: a lambda.
NO_OPERAND = re.compile(r"[-({};,=+*/%&|^!~?:<]|return|[-+*/%&|^<>=!]=|&&|\|\||<<")


@dataclass
class Scope:
    """kind: program, namespace, type, function, or block, which is anything else between braces.
    in_kernel: a kernel function, or a block in one."""

    kind: str
    in_kernel: bool = False


def scopes_of(tokens, kernels):
    """(scope of each token, [(scope, tokens of a declaration in it, without what stands between braces)]).
    kernels: the names of the functions that are kernels."""
    of_token, declarations = [], []
    stack, head = [], []
    scope = Scope("program")
    for t in tokens:
        if t.text == "}" and stack:
            closed = scope
            scope, head = stack.pop()
            if closed.kind != "block" or scope.kind in IN_FUNCTIONS:
                head = []
        of_token.append(scope)
        if t.text == "{":
            opened = _opened(scope, head, kernels)
            if opened.kind == "function":
                declarations.append((scope, head))
            stack.append((scope, head))
            scope, head = opened, []
        elif t.text == ";":
            if head and scope.kind not in IN_FUNCTIONS:
                declarations.append((scope, head))
            head = []
        elif t.text != "}":
            head = [*head, t]
    return of_token, declarations


def _opened(parent, head, kernels):
    words = _without_template(head)
    first = words[0].text if words else ""
    if first in TYPES:
        return Scope("type")
    outside = list(_outside_brackets(words))
    in_brackets = bool(words) and outside[-1:] != words[-1:]
    if parent.kind in IN_FUNCTIONS or in_brackets or any(t.text == "=" for t in outside):
        return Scope("block", parent.in_kernel)
    if first in ("namespace", "extern", "inline") and not any(t.text == "(" for t in words):
        return Scope("namespace")
    name = _function_name(words)
    return Scope("function", name is not None and name.text in kernels)


def _without_template(tokens):
    while tokens and tokens[0].text == "template" and len(tokens) > 1 and tokens[1].text == "<":
        depth, i = 0, 1
        while i < len(tokens):
            depth += {"<": 1, ">": -1, ">>": -2}.get(tokens[i].text, 0)
            i += 1
            if depth <= 0:
                break
        tokens = tokens[i:]
    return tokens


def _outside_brackets(tokens):
    depth = 0
    for t in tokens:
        depth -= t.text in (")", "]")
        if depth == 0:
            yield t
        depth += t.text in ("(", "[")


def _function_name(words):
    """The name in front of the parameters of a declaration; None if it is of no function."""
    before = None
    for t in _outside_brackets(words):
        if t.text == "=":
            return None
        if t.text == "(" and before is not None and before.text != "__attribute__":
            return before
        before = t
    return None


def violations(tokens, scopes, declarations, directives, types):
    """(token, what is wrong) of each violation. directives: the preprocessor's lines; types: the names of the
    scalar and vector types of MSL."""
    for i, (t, scope) in enumerate(zip(tokens, scopes)):
        before = tokens[i - 1].text if i else ";"
        if t.text == "static" and scope.kind in IN_FUNCTIONS:
            yield t, "'static': a function has no static variables in MSL"
        elif t.text == "[" and NO_OPERAND.fullmatch(before):
            yield t, "MSL has no lambda expressions before Metal 4"
    macros = (CONSTANT_MACRO.match(text) for text in [*directives, *_own_macros()])
    constant = {"constant", *(m[1] for m in macros if m)}
    for scope, head in declarations:
        words = _without_template(head)
        function = _function_name(words)
        if function is None:
            yield from _check_variable(scope, words, constant)
        elif scope.kind == "program" and _is_standard(function, head, types):
            yield (
                function,
                (f"'{function.text}': the Metal standard library has a function of this name for these types"),
            )


def _own_macros():
    return re.findall(r"^#define.*", Path(__file__).with_name("msl.h").read_text(), re.M)


def _check_variable(scope, words, constant):
    names = [t for t in _outside_brackets(_until(words, ("=", ","))) if t.kind == "name"]
    texts = {t.text for t in names}
    if len(names) < 2 or names[0].text in NO_VARIABLE or (scope.kind == "type" and "static" not in texts):
        return
    if texts.isdisjoint(constant):
        where = "a static member" if scope.kind == "type" else "at program scope"
        yield names[-1], f"'{names[-1].text}', {where}, must be in the constant address space"


def _is_standard(function, head, types):
    """Whether the declaration is of a function that the standard library has for the type of its first
    parameter: not for one of the text's own."""
    if STANDARD_FUNCTION_PREFIX.match(function.text):
        types = types - WITHOUT_SIMD
    elif function.text not in STANDARD_FUNCTIONS:
        return False
    words = _without_template(head)
    parameters = [t.text for t in head[: -len(words)] if t.kind == "name"]
    at = next(i for i, t in enumerate(words) if t is function)
    first = {t.text for t in _until(words[at + 2 :], (",", ")"))}
    return not first or not first.isdisjoint(types.union(parameters))


def _until(words, ends):
    end = next((i for i, t in enumerate(words) if t.text in ends), len(words))
    return words[:end]
