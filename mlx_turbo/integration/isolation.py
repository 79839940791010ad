"""mlx-lm's BatchGenerator, in which a fault ends one request and not all of them.

A step computes all rows together, so an exception from a cache, a kernel, a sampler or the model does not say whose
it is, and leaves some layers one token further than others. Nothing of such a batch is kept: its rows are computed
anew from their tokens, in two halves, each of which is a batch of its own from then on. A half that fails again is
halved again; a row that fails alone is the one at fault, and is reported. So rows that fail only beside others are
answered alone, and a fault that does not come back costs no request.

Where a memory budget (cache/memory_budget.py) holds no more, the newest row is at fault: it is reported, and the others
are computed anew.

A row that is computed anew repeats its history: the chunks of its prompt, then one step for each token it had already
answered, which is put in place of what is sampled. So a compressed cache packs the same tokens at the same moments, and
the answer goes on as it would have without the fault.
"""

import copy
import dataclasses
import gc
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx

from ..cache.memory_budget import MemoryBudgetError
from .mixed_batch import kind_of
from .prompt_cache import flatten_caches

logger = logging.getLogger("mlx_turbo")


class GenerationError(RuntimeError):
    """A request that could not be answered: its cause in one line, without the arrays that a traceback holds."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"{type(cause).__name__}: {' '.join(str(cause).split())}")


class _Forced:
    """A sampler that gives the tokens a row had already answered, then samples."""

    def __init__(self, tokens: list[int], sampler: Callable[[mx.array], mx.array]) -> None:
        self.tokens, self.sampler = iter(list(tokens)), sampler

    def __call__(self, logprobs: mx.array) -> mx.array:  # [1, vocabulary]
        token = next(self.tokens, None)
        return self.sampler(logprobs) if token is None else mx.array([token], mx.uint32)


@dataclasses.dataclass
class _Row:
    uid: int
    segments: list[list[int]]  # of the whole prompt
    sampler: Callable[[mx.array], mx.array]
    options: dict[str, Any]  # max_tokens, logits_processors, ...: what insert_segments takes for it
    blank: list[Any]  # its caches before the first token
    cached: tuple[list[Any], list[int], list[list[int]]] | None  # caches, their tokens, segments after them: at first
    answered: list[int] = dataclasses.field(default_factory=list)
    n_repeated: int = 0  # of `answered`, still to come from a batch that computes it anew
    anew: bool = False  # whether its batch does that
    from_cache: bool = False  # whether its batch went on from a cache that it did not compute itself


@dataclasses.dataclass
class _Batch:
    generator: Any
    kind: tuple[Any, ...]
    takes_rows: bool  # new ones
    rows: dict[int, _Row] = dataclasses.field(default_factory=dict)  # by the generator's own uid


def _kinds(prompt_cache: list[Any]) -> tuple[Any, ...]:
    return tuple(map(kind_of, flatten_caches(prompt_cache)))


class IsolatedBatchGenerator:
    """What mlx_lm.server uses of mlx_lm.generate.BatchGenerator, over one or more of them.

    generator: that class. options: what it takes besides the model. Rows whose caches differ in kind, because the model
    was enabled with another scheme in between, are in different batches.
    """

    def __init__(self, generator: Callable[..., Any], model: Any, **options: Any) -> None:
        self._new_generator = lambda: generator(model, **options)
        self._model, self._most_rows = model, options.get("completion_batch_size", 32)
        self._batches: list[_Batch] = []
        self._waiting: deque[_Row] = deque()  # while other batches have all the rows there may be
        self._failed: dict[int, GenerationError] = {}  # by uid, still to be reported
        self._n_uids = 0

    def insert_segments(
        self,
        segments: list[list[list[int]]],
        *,
        caches: list[list[Any] | None],
        all_tokens: list[list[int]],
        samplers: list[Callable[[mx.array], mx.array]],
        **options: list[Any],
    ) -> list[int]:
        """As mlx-lm's: add rows, return their uids. A row that cannot be added is reported by `next`."""
        uids = []
        for i, (rest, cache, tokens, sampler) in enumerate(zip(segments, caches, all_tokens, samplers, strict=True)):
            uid, self._n_uids = self._n_uids, self._n_uids + 1
            uids.append(uid)
            whole = [list(tokens), *rest] if tokens else rest
            own = {name: values[i] for name, values in options.items()}
            try:
                blank = self._blank_cache()
            except Exception as e:
                self._report(uid, e)
                continue
            cached = None if cache is None else (cache, list(tokens), rest)
            self._waiting.append(_Row(uid, whole, sampler, own, blank, cached))
        self._add_waiting()
        return uids

    def next(self) -> tuple[list[Any], list[Any]]:
        """One step of every batch: (responses of prompts, of answers) as mlx-lm's. A row that failed has a response of
        its prompt whose `progress` is a GenerationError, once, and no more after it."""
        prompts, answers = [], []
        for batch in list(self._batches):
            try:
                of_prompts, of_answers = batch.generator.next()
            except Exception as e:
                self._divide(batch, e)
                continue
            for r in of_prompts:
                row = batch.rows[r.uid]  # a row that is computed anew has filed the caches of its segments already
                prompts.append(dataclasses.replace(r, uid=row.uid, end_of_segment=r.end_of_segment and not row.anew))
            for r in of_answers:
                row = batch.rows[r.uid]
                if r.finish_reason is not None:
                    del batch.rows[r.uid]
                if row.n_repeated:
                    row.n_repeated -= 1
                else:
                    row.answered.append(r.token)
                    answers.append(dataclasses.replace(r, uid=row.uid))
            if not batch.rows and not batch.takes_rows:
                self._close(batch)
        self._add_waiting()
        response = self._new_response()
        prompts += [response(uid, error, False, False) for uid, error in self._failed.items()]
        self._failed.clear()
        return prompts, answers

    def extract_cache(self, uids: Iterable[int]) -> dict[int, Any]:
        """As mlx-lm's: {uid: (caches, tokens)} of rows; without those of a batch that fails."""
        found: dict[int, Any] = {}
        for batch, inner in self._find(uids):
            try:
                of_batch = batch.generator.extract_cache(inner)
            except Exception as e:
                self._divide(batch, e)
            else:
                found |= {batch.rows[uid].uid: held for uid, held in of_batch.items()}
        return found

    def remove(self, uids: Iterable[int]) -> None:
        """As mlx-lm's: drop rows."""
        uids = set(uids)
        self._waiting = deque(row for row in self._waiting if row.uid not in uids)
        for batch, inner in self._find(uids):
            for uid in inner:
                del batch.rows[uid]
            try:
                batch.generator.remove(inner)
            except Exception as e:
                self._divide(batch, e)
            else:
                if not batch.rows and not batch.takes_rows:
                    self._close(batch)

    @property
    def prompt_cache_nbytes(self) -> int:
        """Bytes of the caches of all rows."""
        total = 0
        for batch in list(self._batches):
            try:
                total += batch.generator.prompt_cache_nbytes
            except Exception as e:
                self._divide(batch, e)
        return total

    def close(self) -> None:
        """As mlx-lm's."""
        for batch in reversed(list(self._batches)):
            self._close(batch)

    # ---- rows --------------------------------------------------------------------------------------------------
    def _blank_cache(self) -> list[Any]:
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self._model)

    def _new_response(self) -> Callable[..., Any]:
        from mlx_lm.generate import PromptProcessingBatch

        return PromptProcessingBatch.Response

    def _find(self, uids: Iterable[int]) -> list[tuple[_Batch, list[int]]]:
        wanted = set(uids)
        found = [(b, [inner for inner, row in b.rows.items() if row.uid in wanted]) for b in self._batches]
        return [(batch, inner) for batch, inner in found if inner]

    def _add_waiting(self) -> None:
        """Move waiting rows into batches. One batch has a queue of its own; several share the places of one."""
        while self._waiting:
            if len(self._batches) > 1 and sum(len(b.rows) for b in self._batches) >= self._most_rows:
                return
            row = self._waiting.popleft()
            self._add(self._open_batch(_kinds(row.cached[0] if row.cached else row.blank)), row)

    def _open_batch(self, kind: tuple[Any, ...]) -> _Batch:
        """The batch that takes new rows of a kind."""
        for batch in list(self._batches):
            if batch.takes_rows and batch.kind == kind:
                return batch
            if not batch.rows:
                self._close(batch)
        return self._new_batch(kind, takes_rows=True)

    def _new_batch(self, kind: tuple[Any, ...], takes_rows: bool) -> _Batch:
        self._batches.append(_Batch(self._new_generator(), kind, takes_rows))
        return self._batches[-1]

    def _add(self, batch: _Batch, row: _Row) -> None:
        cached, row.cached = row.cached, None  # the batch has its tokens from now on
        row.from_cache, row.n_repeated = cached is not None, len(row.answered)
        try:
            cache, tokens, segments = cached or (copy.deepcopy(row.blank), [], row.segments)
            (inner,) = batch.generator.insert_segments(
                segments=[[list(s) for s in segments]],
                caches=[cache],
                all_tokens=[list(tokens)],
                samplers=[_Forced(row.answered, row.sampler) if row.answered else row.sampler],
                **{name: [value] for name, value in row.options.items()},
            )
        except Exception as e:
            self._report(row.uid, e)
        else:
            batch.rows[inner] = row

    # ---- faults ------------------------------------------------------------------------------------------------
    def _divide(self, batch: _Batch, error: Exception) -> None:
        """Compute the rows of a batch that failed anew, in two halves; report a row that failed alone, unless it went
        on from a cache that its batch did not compute itself: that may be what failed."""
        rows = list(batch.rows.values())
        batch.rows.clear()
        self._close(batch)
        if isinstance(error, MemoryBudgetError) and len(rows) > 1:
            newest = max(rows, key=lambda row: row.uid)
            rows.remove(newest)
            self._report(newest.uid, error)
        if len(rows) == 1 and not rows[0].from_cache:
            self._report(rows[0].uid, error)
            rows = []
        elif rows:
            logger.warning("a step of %d requests failed; they are computed anew", len(rows), exc_info=error)
        error.__traceback__ = None  # its frames hold what the failed step computed
        gc.collect()
        mx.clear_cache()
        half = (len(rows) + 1) // 2
        for part in filter(None, (rows[:half], rows[half:])):
            again = self._new_batch(_kinds(part[0].blank), takes_rows=False)
            for row in part:
                row.anew = True
                self._add(again, row)

    def _report(self, uid: int, error: Exception) -> None:
        logger.error("a request failed", exc_info=error)
        self._failed[uid] = GenerationError(error)

    def _close(self, batch: _Batch) -> None:
        self._batches.remove(batch)
        try:
            batch.generator.close()
        except Exception as e:
            logger.warning("a batch could not be closed", exc_info=e)
