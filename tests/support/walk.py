"""A model run over a batch and, beside it, over each of its rows alone."""

import mlx.core as mx
import numpy as np
from support.arrays import to_numpy
from support.caches import random_tokens
from support.tolerances import TOLERANCE

from mlx_turbo.integration import attention


class Recorder:
    """A backend that notes which rows its fused kernel was given."""

    def __init__(self, backend):
        self.backend, self.calls = backend, []

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def attend(self, queries, *args, **options):
        self.calls.append((queries.shape, options["mask"].shape))
        return self.backend.attend(queries, *args, **options)


def check_fused_steps(backend, batch, caches, rng):
    """One token, then three, of a batch with means, head_dim 64: one call of the kernel serves all rows, and each gets
    what mlx-lm's attention makes of the tokens that the row alone (`caches`) restores."""
    recorder = Recorder(backend)
    assert batch.report()["centred"] == ["keys", "values"]
    for n_new in (1, 3):
        new, queries = random_tokens(rng, n_new, batch=3, key_dim=64, value_dim=64), mx.random.normal((3, 4, n_new, 64))
        mask = batch.make_mask(n_new)
        view = attention.view_of(*batch.update_and_fetch(*new))
        got = to_numpy(attention.attend(queries, view, scale=0.1, mask=mask, backend=recorder))
        assert recorder.calls.pop() == (queries.shape, mask.shape) and not recorder.calls
        assert batch.report()["attention"] == "fused"
        for b, cache in enumerate(caches):
            mask = cache.make_mask(n_new, return_array=True)
            keys, values = cache.update_and_fetch(*(x[b : b + 1] for x in new))
            want = to_numpy(
                mx.fast.scaled_dot_product_attention(queries[b : b + 1], keys, values, scale=0.1, mask=mask)
            )
            assert np.abs(got[b] - want[0]).max() < TOLERANCE[mx.float32] * np.abs(want).max()


def merged(caches):
    return [layer[0].merge(list(layer)) for layer in zip(*caches)]


class Walk:
    """Random texts through a model, in batches and each alone; `worst` relative difference of their logits."""

    def __init__(self, model, alone, chunk=16):
        self.model, self.alone, self.chunk, self.worst = model, alone, chunk, 0.0
        self.texts = [np.random.default_rng(b).integers(0, 96, 120) for b in range(len(alone))]
        self.at = [0] * len(alone)

    def step(self, cache, rows, lengths):
        """The next lengths[i] tokens of text rows[i] through `cache`, right-padded as mlx-lm does it, in chunks."""
        width, batched = max(lengths), hasattr(cache[0], "finalize")
        tokens = np.zeros((len(rows), width), np.int64)
        for i, (b, n) in enumerate(zip(rows, lengths)):
            tokens[i, :n] = self.texts[b][self.at[b] : self.at[b] + n]
            self.at[b] += n
        if batched and min(lengths) < width:
            for c in cache:
                c.prepare(lengths=lengths, right_padding=[width - n for n in lengths])
        got = self._logits(tokens, cache)
        if batched and min(lengths) < width:
            for c in cache:
                c.finalize()
        for i, (b, n) in enumerate(zip(rows, lengths)):
            want = self._logits(tokens[i : i + 1, :n], self.alone[b])
            held = np.isfinite(want)  # phi3small's special tokens have -inf
            far = (
                np.abs(got[i : i + 1, :n] - want, where=held, out=np.zeros_like(want)).max() / np.abs(want[held]).max()
            )
            self.worst = np.maximum(self.worst, far)  # keeps NaN

    def joined(self, made):
        """A batch of two rows after right-padded prompts in chunks and decode, which then a third one joins."""
        batch, other = merged(made[:2]), merged(made[2:])
        self.step(batch, [0, 1], [50, 21])
        for _ in range(10):
            self.step(batch, [0, 1], [1, 1])
        self.step(other, [2], [37])
        for mine, new in zip(batch, other):
            mine.extend(new)
        return batch

    def _logits(self, tokens, cache):
        return np.concatenate(
            [
                to_numpy(self.model(mx.array(tokens[:, i : i + self.chunk]), cache=cache))
                for i in range(0, tokens.shape[1], self.chunk)
            ],
            axis=1,
        )
