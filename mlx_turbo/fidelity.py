"""How far a compressed cache moves a model's output: perplexity, KL divergence, agreement of the top token.

All numbers are teacher-forced: the model reads a given text chunk by chunk through its cache, so that it
attends to tokens which the cache gives back. Small chunks matter: the tokens of the chunk itself are exact.
"""
import math

import mlx.core as mx

from .models import make_prompt_cache


def log_probabilities(logits):
    """log softmax of logits [..., vocabulary], float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def negative_log_likelihood(log_p, targets):
    """-log p(target) in nats, [n], from log_p [n, vocabulary] and the tokens that came, targets [n]."""
    return -mx.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]


def perplexity(mean_negative_log_likelihood):
    """exp of the mean negative log likelihood per token (nats)."""
    return math.exp(mean_negative_log_likelihood)


def kl_divergence(log_p, log_q):
    """KL(p || q) in nats per token, [n], from log_p (uncompressed) and log_q [n, vocabulary]."""
    return (mx.exp(log_p) * (log_p - log_q)).sum(-1)


def same_top1(log_p, log_q):
    """Whether both find the same token likeliest, bool [n]."""
    return log_p.argmax(-1) == log_q.argmax(-1)


def compare(model, tokens, configs, chunk=32, progress=None):
    """Read `tokens` through an uncompressed cache and through one per configuration, side by side.

    tokens: token ids of one text, at least 2. configs: name -> scheme, Scheme or TurboConfig. chunk: tokens
    per step. progress: called with (tokens done, tokens in all).

    Returns name -> ({"perplexity", "kld" (mean, nats per token), "top1" (fraction)}, prompt cache), first
    "none", the uncompressed cache.
    """
    from mlx_lm.models.cache import make_prompt_cache as make_plain_cache

    caches = {"none": make_plain_cache(model)}
    caches |= {name: make_prompt_cache(model, config) for name, config in configs.items()}
    totals = {name: [0.0, 0.0, 0.0] for name in caches}
    tokens, n = mx.array(tokens), len(tokens) - 1
    for start in range(0, n, chunk):
        inputs, targets = tokens[start:min(start + chunk, n)], tokens[start + 1:start + chunk + 1]
        log_p = None
        for name, cache in caches.items():
            log_q = log_probabilities(model(inputs[None], cache=cache)[0])
            log_p = log_q if log_p is None else log_p
            sums = mx.stack([negative_log_likelihood(log_q, targets).sum(), kl_divergence(log_p, log_q).sum(),
                             same_top1(log_p, log_q).sum().astype(mx.float32)]).tolist()
            totals[name] = [a + b for a, b in zip(totals[name], sums)]
        if progress:
            progress(min(start + chunk, n), n)
    return {name: ({"perplexity": perplexity(nll / n), "kld": kld / n, "top1": top1 / n}, caches[name])
            for name, (nll, kld, top1) in totals.items()}
