"""Faults in the caches, the kernels and the model: for the rows of a batch that are marked, or once.

A row's `max_tokens` marks it, because that is what mlx-lm's server hands on with a request: see `mark`.
"""

import contextlib
import importlib

from mlx_lm.generate import BatchGenerator

# kind -> what raises
SITES = {
    "packing": "mlx_turbo.cache.packing.quantize_tokens",
    "attention": "mlx_turbo.integration.attention.attend",
    "merging": "mlx_turbo.cache.batch.BatchTurboKVCache._join",
    "filtering": "mlx_turbo.cache.batch.BatchTurboKVCache.filter",
    "extracting": "mlx_turbo.cache.batch.BatchTurboKVCache.extract",
    "trimming": "mlx_turbo.cache.single.TurboKVCache.trim",
    "model": "mlx_lm.models.llama.Model.__call__ mlx_lm.models.qwen3.Model.__call__",
}
MARKED = "packing", "attention", "merging", "model"  # kinds that a row can be marked with


class PlantedFault(Exception):
    pass


def mark(kind, n_answered=0):
    """The max_tokens of a row that is at fault once it has answered so many tokens."""
    return 1000 + 100 * MARKED.index(kind) + n_answered


def marked_with(max_tokens):
    """(kind, n_answered) of `mark`, or None."""
    return (MARKED[max_tokens // 100 - 10], max_tokens % 100) if max_tokens >= 1000 else None


class WatchedBatchGenerator(BatchGenerator):
    """Knows which rows a step computes."""

    stepping = None

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.rows = {}  # uid -> [max_tokens, tokens answered]

    def insert_segments(self, segments, max_tokens, **options):
        uids = super().insert_segments(segments=segments, max_tokens=max_tokens, **options)
        self.rows |= {uid: [n, 0] for uid, n in zip(uids, max_tokens)}
        return uids

    def remove(self, uids, **options):
        for uid in uids:
            self.rows.pop(uid, None)
        return super().remove(uids, **options)

    def next(self):
        before, WatchedBatchGenerator.stepping = WatchedBatchGenerator.stepping, self
        try:
            prompts, answers = super().next()
        finally:
            WatchedBatchGenerator.stepping = before
        for r in answers:
            self.rows[r.uid][1] += 1
            if r.finish_reason is not None:
                del self.rows[r.uid]
        return prompts, answers

    def is_at_fault(self, kind):
        marks = [(marked_with(n), answered) for n, answered in self.rows.values()]
        return any(m and m[0] == kind and answered >= m[1] for m, answered in marks)


class Planted:
    """Wraps what `kinds` name. Marked rows are at fault; besides, `due(kind)` says whether a call raises."""

    def __init__(self, kinds=SITES, due=lambda kind: False):
        self.due, self.fired, self.undo = due, [], []
        for kind in kinds:
            for path in SITES[kind].split():
                self.wrap(kind, path)

    def wrap(self, kind, path):
        *owner, name = path.split(".")
        holder = importlib.import_module(".".join(owner[: len(owner) - owner[-1][:1].isupper()]))
        holder = getattr(holder, owner[-1]) if owner[-1][:1].isupper() else holder
        original = vars(holder)[name]

        def raising(*args, **options):
            stepping = WatchedBatchGenerator.stepping
            if self.due(kind) or stepping is not None and stepping.is_at_fault(kind):
                self.fired.append((kind, len(stepping.rows) if stepping else 0))
                raise PlantedFault(f"planted in {kind}")
            return getattr(original, "__func__", original)(*args, **options)

        setattr(holder, name, classmethod(raising) if isinstance(original, classmethod) else raising)
        self.undo.append(lambda: setattr(holder, name, original))

    def remove(self):
        for undo in reversed(self.undo):
            undo()


@contextlib.contextmanager
def planted(**options):
    faults = Planted(**options)
    try:
        yield faults
    finally:
        faults.remove()


def once(kind, n):
    """`due` of a fault at the n-th call of a kind, from 1 on, and never again."""
    calls = 0

    def due(of):
        nonlocal calls
        calls += of == kind
        return of == kind and calls == n

    return due


def plant_in_server(every=0):
    """In the process of a server, before it starts: marked requests fail, and every so many-th trim does."""
    import mlx_lm.server

    mlx_lm.server.BatchGenerator = WatchedBatchGenerator
    n = 0

    def due(kind):
        nonlocal n
        n += kind == "trimming"
        return kind == "trimming" and every > 0 and n % every == 0

    Planted(due=due)
