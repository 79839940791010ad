"""Where the attention kernel's time goes: variants of attend.metal with one stage taken out, by text substitution.

Their results are wrong by construction; only their time means anything. What a stage costs is the time of the whole
kernel less that of the variant without it. The costs need not add up: a GPU overlaps reading and arithmetic.
"""

import re
from collections.abc import Mapping, Sequence

from ..backends.attend_launch import attend_shape
from ..backends.kernel_backend import KernelBackend
from ..backends.sources import BODY_MARKER, metal_source
from ..quant.scheme import Scheme

_NO_CODEBOOK = [
    ("return as_type<half2>(low + x) - as_type<half2>(sum - x);", "return as_type<half2>(x);"),
]
_NO_VALUES = [("int n = min(TILE, end - t0);", "int n = 0;")]
_NO_SOFTMAX = [
    ("top = simd_max(top);", ""),
    ("if (top > m) {", "if (false) {"),
    ("float weight = fast::exp2(s[i * ROWS + h] - m);", "float weight = s[i * ROWS + h];"),
]
# Every word is read and enters the result through one operation.
_BYTES_ONLY = _NO_SOFTMAX + [
    (
        "struct Raw { uint w[8]; };",
        """struct Raw { uint w[8]; };
  template <int N> static METAL_FUNC float fold(const thread Raw &raw) {
    uint x = B == 3 ? raw.w[2] : 0;
    TQ_UNROLL for (int i = 0; i < (B == 3 ? N / 16 : N * B / 32); i++) x ^= raw.w[i];
    return float(x & 1u);
  }""",
    ),
    (
        "struct Raw { vec<T, 4> v[8]; };",
        """struct Raw { vec<T, 4> v[8]; };
  template <int N> static METAL_FUNC float fold(const thread Raw &raw) {
    vec<T, 4> x = raw.v[0];
    TQ_UNROLL for (int i = 1; i < N / 4; i++) x += raw.v[i];
    return float(x.x + x.y + x.z + x.w);
  }""",
    ),
    (
        "struct Raw { half4 v[8]; };",
        """struct Raw { half4 v[8]; };
  template <int N> static METAL_FUNC float fold(const thread Raw &raw) { return float(raw.v[0].x); }""",
    ),
    (
        "TQ_UNROLL for (int x = 0; x < N / 8; x++) { float y[TOKENS_PER_LANE][8];",
        """\
  TQ_UNROLL for (int i = 0; i < TOKENS_PER_LANE; i++) s[i * ROWS] += KEYS::template fold<N>(raw[i]);
  TQ_UNROLL for (int x = 0; x < 0; x++) {
    float y[TOKENS_PER_LANE][8];""",
    ),
    (
        "half2 z[DIMS_PER_LANE / 2];",
        """uint words = 0;
    TQ_UNROLL for (int i = 0; i < int(sizeof(raw.w) / sizeof(uint)); i++) words ^= raw.w[i];
    TQ_UNROLL for (int i = 1; i < DIMS_PER_LANE; i++) y[i] = 0;
    y[0] = float(words & 1u);
    return;
    half2 z[DIMS_PER_LANE / 2];
""",
    ),
    (
        "TQ_UNROLL for (int d = 0; d < DIMS_PER_LANE; d++) out.acc[h][d] = fma(p[h], y[d], out.acc[h][d]);",
        "if (h == 0) out.acc[0][0] += y[0];",
    ),
]
_NOTHING = [("for (int t0 = begin; t0 < end; t0 += TILE) {", "for (int t0 = begin; t0 < begin; t0 += TILE) {")]

STAGES: dict[str, tuple[str, list[tuple[str, str]]]] = {  # name: (what is left out or left, substitutions)
    "full": ("the kernel as it is", []),
    "no codebook": ("codes are used as numbers, no levels are computed", _NO_CODEBOOK),
    "no values": ("values are neither read nor summed", _NO_VALUES),
    "no softmax": ("logits are used as weights", _NO_SOFTMAX),
    "bytes only": ("keys and values are read, and nothing is computed from them", _BYTES_ONLY),
    "nothing": ("launches, the query's rotation and the merge alone", _NOTHING),
}


def substitute(text: str, substitutions: Sequence[tuple[str, str]]) -> str:
    """`text` with each (old, new) replaced, whatever the white space. Raises ValueError unless every `old` stands in it
    exactly once."""
    for old, new in substitutions:
        pattern = re.compile(r"\s+".join(map(re.escape, old.split())))
        if (found := len(pattern.findall(text))) != 1:
            raise ValueError(f"attend.metal has {found} times, and an ablation expects once: {old!r}")
        text = pattern.sub(lambda match: new, text)
    return text


def variant(stage: str) -> tuple[str, str]:
    """(header, body) of attend.metal without a stage. Raises ValueError where the kernel's text has changed."""
    text = substitute(BODY_MARKER.join(metal_source("attend")), STAGES[stage][1])
    header, body = text.split(BODY_MARKER)
    return header, body


class AblatedBackend(KernelBackend):
    """Kernels with a stage of `attend` taken out. Not tested against the oracle: it is wrong on purpose."""

    def __init__(self, stage, like):
        """like: the KernelBackend whose kernels and tuning to use."""
        super().__init__(like.metal_kernel, like.name, like.title, is_real=like.is_real, tuned=like.tuned)
        self.stage, self.tuning = stage, like.tuning

    def kernel(self, name, inputs, outputs):
        if name != "attend" or self.stage == "full":
            return super().kernel(name, inputs, outputs)
        if name not in self._kernels:
            header, body = variant(self.stage)
            self._kernels[name] = self.metal_kernel(  # a name of its own, or MLX would build it anew for every call
                f"turbo_attend_{self.stage.replace(' ', '_')}",
                inputs,
                outputs,
                body,
                header=header,
                ensure_row_contiguous=False,
            )
        return self._kernels[name]

    def run_check(self, what, check):
        pass


def covers(backend: KernelBackend, scheme: Scheme, head_dim: int, gqa: int) -> bool:
    """Whether the stages are those of this kernel: where simdgroups share decoded tiles, it has others."""
    key = scheme.key_bits, scheme.value_bits, head_dim, head_dim
    return not attend_shape(backend.tuned.get(key, backend.tuning), *key, gqa, 1, False).SHARED_TILES


def verdict(seconds: Mapping[str, float]) -> str:
    """A sentence on what bounds the kernel, from {stage: seconds}."""
    full = seconds["full"]
    share = {stage: took / full for stage, took in seconds.items()}
    if share["nothing"] > 0.5:
        return f"Bound by launching: {share['nothing']:.0%} of the time is left when no token is looked at."
    if share["bytes only"] > 0.8:
        return f"Bound by memory: reading the bytes alone takes {share['bytes only']:.0%} of the time."
    stage = min(("no codebook", "no values", "no softmax"), key=share.__getitem__)
    return (
        f"Bound by arithmetic: reading the bytes alone takes {share['bytes only']:.0%} of the time; the largest "
        f"stage is the {stage.removeprefix('no ')}, without it {share[stage]:.0%} is left."
    )
