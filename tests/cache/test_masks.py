"""Our masks against mlx-lm's, and the error of a conversion that nobody registered."""

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import create_attention_mask

from mlx_turbo import TurboKVCache
from mlx_turbo.cache import conversion
from mlx_turbo.cache.masks import attention_mask, causal_mask

N = st.integers(1, 12)
OFFSET = st.integers(0, 20)
WINDOW = st.none() | st.integers(1, 35)


def same_mask(got, want):
    if isinstance(want, mx.array):
        return isinstance(got, mx.array) and got.dtype == want.dtype and mx.array_equal(got, want).item()
    return type(got) is type(want) and got == want


@given(n=N, offset=OFFSET, window_size=WINDOW)
def test_causal_masks_are_those_of_mlx_lm(n, offset, window_size):
    assert same_mask(causal_mask(n, offset, window_size), create_causal_mask(n, offset, window_size=window_size))


@given(n=N, offset=OFFSET, return_array=st.booleans(), window_size=WINDOW)
def test_attention_masks_are_those_of_mlx_lm_s_caches(n, offset, return_array, window_size):
    want = create_attention_mask(n, offset=offset, return_array=return_array, window_size=window_size)
    assert same_mask(attention_mask(n, offset, return_array, window_size), want)


@pytest.mark.parametrize("name", ["to_kv_cache", "to_quantized"])
def test_a_conversion_that_is_not_registered_says_what_to_import(monkeypatch, name):
    monkeypatch.setattr(conversion, "_converters", {})
    with pytest.raises(RuntimeError, match=f"{name}: .* import mlx_turbo.integration.conversion first"):
        getattr(TurboKVCache(), name)()
