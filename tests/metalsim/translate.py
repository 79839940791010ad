"""MSL text -> C++ text that clang compiles for the host, with the help of rules.py for what clang would not refuse.

Every line stays where it is, so diagnostics point at the MSL line. The translation only
  * drops [[attributes]] (remembering those of kernel parameters) and #include <metal_*>;
  * makes `threadgroup` variables static;
  * turns float4(...), (float4)x and static_cast<float4>(x) into conversions that behave as in MSL;
  * makes unsuffixed floating literals float, and h/bf suffixes half/bfloat;
  * gives function constants their values.

It is a token rewriter, not a parser: the checks for address spaces and recursion are heuristics that suit the
way kernels are written, and clang has the last word on types.
"""

import re

from .rules import scopes_of, violations

TOKEN = re.compile(
    r"""
    (?P<comment>//[^\n]*|/\*.*?\*/)
  | (?P<directive>^[ \t]*\#(?:[^\n\\]|\\.|\\\n)*)
  | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
  | (?P<number>\.?[0-9](?:[eEpP][+-]|[\w.])*)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<space>\s+)
  | (?P<operator>->\*|<<=|>>=|\.\.\.|::|\[\[|->|\+\+|--|<<|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)
""",
    re.X | re.S | re.M,
)

VECTOR_ELEMENTS = "bool char uchar short ushort int uint long ulong half bfloat float".split()
VECTORS = {f"{element}{n}" for element in VECTOR_ELEMENTS for n in (2, 3, 4)}
SIZED = {f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)}
SCALARS = {*VECTOR_ELEMENTS, *SIZED, "size_t", "ptrdiff_t", "float16_t", "bfloat16_t", "void"}
ATOMICS = {"atomic_uint", "atomic_int", "atomic_float", "atomic_bool"}
ADDRESS_SPACES = {"device", "constant", "threadgroup", "thread", "threadgroup_imageblock"}
FORBIDDEN = {
    "double": "MSL has no double",
    "virtual": "no virtual functions in MSL",
    "try": "no exceptions in MSL",
    "throw": "no exceptions in MSL",
    "goto": "no goto in MSL",
    "new": "no new in MSL",
    "delete": "no delete in MSL",
    "dynamic_cast": "no dynamic_cast in MSL",
    "typeid": "no typeid in MSL",
    "thread_local": "no thread_local in MSL",
    "asm": "no inline assembly in MSL",
    "printf": "no printf in MSL",
}
MAX_BUFFERS = 31  # in the argument table of a kernel
# `used`: to an optimiser of C++ a static belongs to one thread, so it would fold what other threads write.
THREADGROUP_VARIABLE = "static __attribute__((used)) threadgroup"


class MSLError(Exception):
    """The program is not valid MSL, or did something undefined when it ran."""


class Token:
    """One token. `text` is what the MSL says, `out` what the C++ will say."""

    __slots__ = ("kind", "text", "line", "out")

    def __init__(self, kind, text, line):
        self.kind, self.text, self.line, self.out = kind, text, line, text


class Source:
    """One MSL translation unit.

    cpp      the C++ text, line for line
    kernels  kernel name -> [(parameter name, [attribute, ...]), ...]; no attributes means an implicit buffer

    constants: function constants, {index or name: value}. Raises MSLError with one line per problem found.
    """

    def __init__(self, msl, constants=None):
        self.constants = constants or {}
        self.kernels = {}
        self.errors = []
        self.all_tokens = _tokenize(msl)
        self._check_includes()
        self.tokens = [t for t in self.all_tokens if t.kind not in ("comment", "space", "directive")]
        self._check_forbidden()
        self._rewrite_literals()
        self._collect_types()
        self._strip_attributes()
        self._check_rules()
        self._make_threadgroup_variables_static()
        self._rewrite_vector_conversions()
        self._check_pointers_have_address_spaces()
        self._check_recursion()
        if self.errors:
            raise MSLError("\n".join(self.errors))
        self.cpp = "".join(t.out for t in self.all_tokens)

    def _error(self, token, text):
        self.errors.append(f"line {token.line}: {text}")

    # ---- what MSL does not have ------------------------------------------------------------------

    def _check_includes(self):
        for t in self.all_tokens:
            if t.kind == "directive" and re.match(r"\s*#\s*(include|import)\b", t.text):
                if not re.match(r"\s*#\s*include\s*<metal_\w+>", t.text):
                    what = t.text.strip()
                    self._error(t, f"{what}: only <metal_*> can be included by a kernel compiled at run time")
                t.out = ""

    def _check_forbidden(self):
        before = None
        for t, after in zip(self.tokens, [*self.tokens[1:], Token("operator", ";", 0)]):
            is_member = before is not None and before.text in (".", "->", "=")
            if t.kind == "name" and t.text in FORBIDDEN and not is_member:
                self._error(t, f"'{t.text}': {FORBIDDEN[t.text]}")
            if t.text == "std" and after.text == "::":
                self._error(t, "std:: is not available in MSL")
            before = t

    def _rewrite_literals(self):
        for t in self.tokens:
            if t.kind != "number" or re.match(r"0[xXbB]", t.text):
                continue
            base, suffix = re.match(r"([0-9.]*(?:[eE][-+]?\d+)?)(.*)", t.text).groups()
            is_floating = "." in base or "e" in base.lower()
            value = base if is_floating else base + ".0"
            if is_floating and suffix in ("l", "L"):
                self._error(t, f"{t.text}: MSL has no long double")
            if is_floating and suffix == "" or suffix in ("f", "F"):
                t.out = value + "f"
            elif suffix in ("h", "H"):
                t.out = value + "f16"
            elif suffix in ("bf", "BF"):
                t.out = f"((bfloat){value}f)"

    # ---- types -----------------------------------------------------------------------------------

    def _collect_types(self):
        """Names that denote types, and those among them that denote vectors."""
        self.types, self.vectors = SCALARS | VECTORS, set(VECTORS)
        tokens = self.tokens
        for i, t in enumerate(tokens[:-2]):
            if t.text in ("typename", "class", "struct", "enum", "union") and tokens[i + 1].kind == "name":
                self.types.add(tokens[i + 1].text)
            elif t.text == "using" and tokens[i + 2].text == "=":
                self._add_alias(tokens[i + 1], tokens[i + 3 : i + 6])
            elif t.text == "typedef":
                end = next(j for j in range(i, len(tokens)) if tokens[j].text == ";")
                name = next((j for j in range(i + 1, end) if tokens[j].text == "["), end) - 1
                self._add_alias(tokens[name], tokens[i + 1 : name])

    def _add_alias(self, name, definition):
        self.types.add(name.text)
        words = [t.text for t in definition if t.text not in ("metal", "::", "typename")]
        if words and (words[0] in self.vectors or words[0] == "vec") and "*" not in words:
            self.vectors.add(name.text)

    # ---- attributes, kernels and function constants ----------------------------------------------

    def _strip_attributes(self):
        tokens, i = self.tokens, 0
        # id of the token before [[...]] -> texts between the brackets
        attributes = {}
        while i < len(tokens):
            if tokens[i].text == "[[":
                end = (
                    next(k for k in range(i, len(tokens) - 1) if tokens[k].text == "]" and tokens[k + 1].text == "]")
                    + 1
                )
                text = "".join(t.text for t in tokens[i + 1 : end - 1])
                attributes.setdefault(id(tokens[i - 1]), []).append(text)
                for t in tokens[i : end + 1]:
                    t.out = ""
                    t.kind = "kernel" if t.text == "kernel" else "attribute"
                i = end
            i += 1
        for i, t in enumerate(tokens):
            if t.text == "kernel":
                self._add_kernel(tokens, i, attributes)
        self.tokens = [t for t in tokens if t.kind not in ("attribute", "kernel")]
        for t, after in zip(self.tokens, self.tokens[1:]):
            for text in attributes.get(id(t), []):
                if text.startswith("function_constant(") and after.text == ";":
                    self._set_function_constant(t, text)

    def _set_function_constant(self, name, attribute):
        index = int(attribute[len("function_constant(") : -1])
        value = self.constants.get(index, self.constants.get(name.text))
        if value is None:
            self._error(name, f"function constant {name.text} ({index}) has no value")
        name.out += f" = {str(value).lower()}"

    def _add_kernel(self, tokens, i, attributes):
        opening = next(
            (j for j in range(i, len(tokens)) if tokens[j].text in ("(", ";") and tokens[j].kind != "attribute"), None
        )
        if opening is None or tokens[opening].text == ";":
            return
        if any(t.text == "decltype" for t in tokens[i:opening]):
            return  # an explicit instantiation
        closing = _matching(tokens, opening, "(", ")")
        parameters, depth, name, n_buffers = [], 0, None, 0
        for t in tokens[opening + 1 : closing + 1]:
            if t.kind in ("attribute", "kernel"):
                continue
            if depth == 0 and (t.text == "," or t is tokens[closing]) and name:
                texts = ",".join(attributes.get(id(name), []))
                parameters.append((name.text, texts.split(",") if texts else []))
                index = re.search(r"buffer\((\d+)\)", texts)
                n_buffers += not texts or "buffer(" in texts
                if index and int(index[1]) >= MAX_BUFFERS:
                    self._error(name, f"buffer({index[1]}): Metal has the buffers 0 to {MAX_BUFFERS - 1}")
                elif n_buffers == MAX_BUFFERS + 1:
                    self._error(name, f"a kernel has at most {MAX_BUFFERS} buffers")
                name = None
                continue
            depth += (t.text in "(<") - (t.text in ")>")
            if t.kind == "name":
                name = t
        self.kernels[tokens[opening - 1].text] = parameters
        tokens[i].out = "static"  # kernels of the text that are not run are not compiled

    # ---- rewriting -------------------------------------------------------------------------------

    def _make_threadgroup_variables_static(self):
        tokens = self.tokens
        for i, t in enumerate(tokens):
            if t.text != "threadgroup" or (i > 0 and tokens[i - 1].text not in ";{}"):
                continue
            j = i + 1
            while tokens[j].text in ("const", "volatile", "metal", "::"):
                j += 1
            j = _after_angles(tokens, j + 1) if tokens[j + 1].text == "<" else j + 1
            if tokens[j].kind != "name":
                continue  # threadgroup T* p
            if id(t) not in self.in_kernel:
                self._error(t, "only a kernel function has threadgroup variables")
            t.out, depth = THREADGROUP_VARIABLE, 0
            while depth or tokens[j].text != ";":
                if not depth and tokens[j + 1].text in (",", ";"):
                    tokens[j].out += " = {}"  # clang finds no default constructor in this address space
                if tokens[j].text == "=":
                    self._error(t, "a threadgroup variable cannot have an initialiser")
                j += 1
                depth += (tokens[j].text in "([{") - (tokens[j].text in ")]}")

    def _rewrite_vector_conversions(self):
        tokens = self.tokens
        for i, t in enumerate(tokens[:-2]):
            after = tokens[i + 1].text
            before = tokens[i - 1].text if i else ""
            if t.text in self.vectors and after == "(" and before != "operator":
                t.out = f"msl::make<{t.out}>"
            elif t.text == "vec" and after == "<":
                end = _after_angles(tokens, i + 1)
                if end < len(tokens) and tokens[end].text == "(":
                    t.out, tokens[end - 1].out = "msl::make<vec", ">>"
            elif t.text == "(" and after in self.vectors and self._is_c_cast(i):
                t.out, tokens[i + 2].out = "msl::Cast<", ">()->*"
            elif t.text == "static_cast" and after == "<":
                target = [x.text for x in tokens[i + 2 : _after_angles(tokens, i + 1)]]
                is_vector = "vec" in target or not self.vectors.isdisjoint(target)
                if is_vector and "*" not in target and "&" not in target:
                    t.out = "msl::static_convert"

    def _is_c_cast(self, i):
        """Whether `( type )` at i is a cast: something is converted, and it is not a call or sizeof."""
        tokens = self.tokens
        if tokens[i + 2].text != ")" or i + 3 >= len(tokens):
            return False
        if i and tokens[i - 1].kind == "name" and tokens[i - 1].text != "return":
            return False
        operand = tokens[i + 3]
        return operand.kind in ("name", "number") or operand.text in "(-~"

    # ---- rules clang would not enforce -----------------------------------------------------------

    def _check_rules(self):
        directives = [t.text for t in self.all_tokens if t.kind == "directive"]
        scopes, declarations = scopes_of(self.tokens, self.kernels)
        for token, text in violations(self.tokens, scopes, declarations, directives, SCALARS | VECTORS):
            self._error(token, text)
        self.in_kernel = {id(t) for t, scope in zip(self.tokens, scopes) if scope.in_kernel}

    def _check_pointers_have_address_spaces(self):
        tokens = self.tokens
        pointees = self.types | ATOMICS | {"const", "auto"}
        for i, t in enumerate(tokens):
            pointee = tokens[i - 1].text if i else ""
            if t.text not in ("*", "&") and not (t.text == "&&" and pointee == "auto"):
                continue
            if pointee == ">":
                is_declarator = i + 2 < len(tokens) and tokens[i + 1].kind == "name" and tokens[i + 2].text in ",);=["
                if not (is_declarator and self._closes_template_type(i - 1)):
                    continue
            elif pointee not in pointees:
                continue
            start = self._declaration_start(i)
            declaration = {x.text for x in tokens[start + 1 : i]}
            is_alias = "using" in [x.text for x in tokens[max(0, start - 2) : i]]
            if declaration.isdisjoint(ADDRESS_SPACES) and not is_alias:
                self._error(
                    t,
                    f"pointer or reference to '{pointee}' needs an explicit address space "
                    "(device, constant, threadgroup or thread)",
                )

    def _declaration_start(self, i):
        """Index of the token before the declaration that ends at the '*' or '&' at i."""
        tokens, j, depth = self.tokens, i - 1, 0
        while j >= 0:
            if depth == 0:
                if tokens[j].text in ";{}(),=":
                    break
                opens_cast = tokens[j - 1].text in ("static_cast", "reinterpret_cast", "template")
                if tokens[j].text == "<" and opens_cast:
                    break
            depth += (tokens[j].text == ">") - (tokens[j].text == "<")
            j -= 1
        return j

    def _closes_template_type(self, close):
        """Whether the '>' at close ends a type such as atomic<T> or vec<T, 4>, and not a comparison."""
        depth = 0
        for j in range(close, max(0, close - 12), -1):
            depth += (self.tokens[j].text == ">") - (self.tokens[j].text == "<")
            if depth == 0:
                return self.tokens[j - 1].text in self.types | {"atomic", "_atomic", "vec"}
        return False

    def _check_recursion(self):
        calls = self._calls_of_free_functions()

        def reachable(function, seen):
            for callee in calls.get(function, set()) - seen:
                seen.add(callee)
                reachable(callee, seen)
            return seen

        for function in calls:
            if function in reachable(function, set()):
                self.errors.append(f"function {function} is recursive: not allowed in MSL")

    def _calls_of_free_functions(self):
        """function -> names it calls. Templates are left out (their recursion ends at compile time), and so
        are methods (those of one name usually belong to several types) and overloaded functions."""
        tokens, calls, depth, i = self.tokens, {}, 0, 0
        while i < len(tokens) - 1:
            depth += (tokens[i].text == "{") - (tokens[i].text == "}")
            if depth == 0 and i and tokens[i].kind == "name" and tokens[i + 1].text == "(":
                body = self._function_body(i)
                if body:
                    start, stop = body
                    name = tokens[i].text
                    callees = {
                        t.text
                        for k, t in enumerate(tokens[start:stop], start)
                        if t.kind == "name"
                        and tokens[k + 1].text in ("(", "<")
                        and tokens[k - 1].text not in (".", "->", "::")
                    }
                    calls[name] = set() if name in calls else callees
                    i = stop
            i += 1
        return calls

    def _function_body(self, i):
        """(start, stop) of the body of the non-template function defined with its name at i, or None."""
        tokens = self.tokens
        if tokens[i - 1].kind != "name" and tokens[i - 1].text not in (">", "*", "&"):
            return None
        start = _matching(tokens, i + 1, "(", ")") + 1
        if start >= len(tokens) or tokens[start].text != "{":
            return None
        previous = next((j for j in range(i, -1, -1) if tokens[j].text in ";}"), -1)
        if any(t.text == "template" for t in tokens[previous + 1 : i]):
            return None
        return start, _matching(tokens, start, "{", "}")


def _tokenize(msl):
    tokens, line = [], 1
    for match in TOKEN.finditer(msl):
        tokens.append(Token(match.lastgroup, match.group(), line))
        line += match.group().count("\n")
    return tokens


def _matching(tokens, i, opening, closing):
    """Index of the bracket that closes the one at i."""
    depth = 0
    for j in range(i, len(tokens)):
        depth += (tokens[j].text == opening) - (tokens[j].text == closing)
        if depth == 0:
            return j
    raise MSLError(f"line {tokens[i].line}: unbalanced {opening}")


def _after_angles(tokens, i):
    """Index just past the '>' that closes the '<' at i."""
    depth = 0
    for j in range(i, len(tokens)):
        depth += {"<": 1, ">": -1, ">>": -2}.get(tokens[j].text, 0)
        if depth <= 0:
            return j + 1
    return len(tokens)
