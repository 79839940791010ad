"""What hypothesis draws for the tests of caches, and its settings."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from support.caches import DTYPES

from mlx_turbo import Scheme, TurboConfig
from mlx_turbo.quant.scheme import BITS

# the backend is set for the whole test, not per example: that is what we want. Deterministic: CI must not flicker.
quick = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SCHEMES = st.builds(Scheme, st.sampled_from(BITS), st.sampled_from(BITS))

CONFIGS = st.builds(
    TurboConfig,
    SCHEMES,
    sink=st.integers(0, 5),
    recent=st.integers(0, 6),
    block=st.integers(1, 6),
    seed=st.integers(0, 2),
)

CHUNKS = st.lists(st.one_of(st.just(1), st.integers(0, 9), st.integers(12, 30)), min_size=1, max_size=8)

SHAPES = st.fixed_dictionaries(
    dict(
        batch=st.integers(1, 2),
        heads=st.integers(1, 2),
        key_dim=st.sampled_from([32, 64, 80, 16]),
        value_dim=st.sampled_from([32, 96, 8]),
        dtype=st.sampled_from(list(DTYPES.values())),
    )
)
