"""`auto`: how many bits the keys of a layer need, measured on the first prompt chunk with its own queries.

For a sample of queries and tokens the attention weights p with exact keys are compared with those p' with quantized
keys, exact tokens and centring as in the cache: error = KL(p || p') in nats, the mean over sampled queries and query
heads of a kv head, the worst kv head counting. Bits are raised along LADDER until error <= TARGET.
"""
import mlx.core as mx

from . import ops
from .centring import SEGMENT, plain, stored, summarize, worth_it
from .kernels import PackedSide, QuantizeSide

LADDER = (4, 8, 0)  # bits of keys; 0 = exact
TARGET = 0.02  # nats
N_QUERIES, N_SEGMENTS = 16, 4  # sampled query tokens; sampled segments of keys


def sample_segments(n):
    """First tokens of at most N_SEGMENTS runs of SEGMENT tokens, evenly spaced over n tokens, and their length."""
    length = min(SEGMENT, n)
    runs = min(N_SEGMENTS, n // length)
    return [round(i * (n - length) / max(runs - 1, 1)) for i in range(runs)], length


def attention_error(queries, keys, bits, config, scale, sinks=None):
    """The error of the attention weights, in nats, if `keys` were packed at `bits`: a lazy float32 scalar.

    queries: [B, n_heads, n, D], of the newest tokens. keys: [B, n_kv_heads, N, D], exact, of all tokens, N > sink +
    recent of `config`. sinks: [n_heads] or None.
    """
    B, H, N, D = keys.shape
    first, last = config.sink, N - config.recent
    starts, length = sample_segments(last - first)
    x = mx.concatenate([keys[:, :, first + at:first + at + length] for at in starts], axis=2)
    error = mx.flatten(_error(mx.unflatten(x, 2, (len(starts), length)), bits, config), 2, 3)
    q = queries.astype(mx.float32).reshape(B, H, -1, D) * scale
    n_exact = config.sink + config.recent
    exact = mx.concatenate([keys[:, :, :first], keys[:, :, last:]], axis=2) if n_exact else keys[:, :, :0]
    logits = mx.concatenate([q @ exact.astype(mx.float32).swapaxes(-1, -2), q @ x.astype(mx.float32).swapaxes(-1, -2)
                             + mx.log(mx.array((last - first) / x.shape[2]))], axis=-1)
    shift = mx.pad(q @ error.swapaxes(-1, -2), [(0, 0)] * 3 + [(n_exact, 0)])
    if sinks is not None:
        extra = mx.broadcast_to(sinks.astype(mx.float32).reshape(1, H, -1, 1), (B, H, queries.shape[1] // H, queries.shape[2]))
        logits = mx.concatenate([logits, extra.reshape(B, H, -1, 1)], axis=-1)
        shift = mx.pad(shift, [(0, 0)] * 3 + [(0, 1)])
    p = mx.softmax(logits, axis=-1)
    kl = mx.logsumexp(mx.log(mx.maximum(p, 1e-30)) + shift, axis=-1) - (p * shift).sum(-1)
    return kl.mean(-1).max()


def _error(x, bits, config):
    """Restored minus exact of x [B, H, S, T, D], S segments."""
    B, H, S, T, D = x.shape
    mean = None
    if config.centre:
        summary = summarize(mx.flatten(x, 2, 3), 0, T)
        mean = plain(stored(summary[0], worth_it(*summary), config.seed), config.seed)
        mean = mean.reshape(B, H * S, 1, D)
    x = x.reshape(B, H * S, T, D)
    (codes, gamma), = ops.quantize_sides([QuantizeSide(x, bits, mean)], config.seed, scale=config.scale)
    restored, = ops.dequantize_sides([PackedSide(codes, gamma, bits, D, mean)], 0, T, mx.float32, config.seed)
    return (restored - x.astype(mx.float32)).reshape(B, H, S, T, D)


def choose_key_bits(queries, keys, config, scale, sinks=None):
    """(bits, {bits tried: error in nats}) for the keys of a layer: see `attention_error`. Evaluates."""
    errors = {}
    for bits in LADDER:
        if bits and bits < config.scheme.key_bits:
            continue
        if not bits:
            return 0, errors
        errors[bits] = attention_error(queries, keys, bits, config, scale, sinks).item()
        if errors[bits] <= TARGET:
            return bits, errors
