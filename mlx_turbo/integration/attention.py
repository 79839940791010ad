"""Attention straight from a compressed cache, and the door by which the models of mlx-lm and mlx-vlm reach it.

`update_and_fetch` returns `LazyKV` arrays. The replacement for their scaled_dot_product_attention looks at the
arrays it is given, never at `cache`: when keys and values are the LazyKV of one cache as it is now, attention runs on
the packed state; for anything else the original runs. So a model that transforms its keys, passes another layer's, or
calls attention in its own way stays correct: it reads the lazy arrays and is merely slower.
"""

import dis
import functools
import sys
import threading
import types

from ..backends.attend_launch import MAX_QUERY_TOKENS
from ..backends.select import get_backend
from ..backends.sides import RopePart
from ..cache.last_step import BY_THE_MODEL, ELSEWHERE, NOT_SEEN, NOT_YET, NOTHING_PACKED, register_attention
from ..cache.single import TurboKVCache
from ..cache.view import KeyLogits, LazyKV
from .libraries import OLDEST


def view_of(keys, values):
    """The `KVView` whose keys and values these two arrays are, or None. Latents serve as both: then its values are its
    keys, and `rope` is the other side."""
    if type(keys) is not LazyKV or type(values) is not LazyKV:
        return None
    view = keys.view
    if view is not values.view or keys.side or not view.is_current():
        return None
    if values.side:
        return view
    if view.keys.balance is not None or view.keys.has_means:  # which sums of values cannot have
        return None
    return view._replace(values=view.keys, rope=view.values)


def attend(queries, view, *, scale, mask=None, sinks=None, backend=None):
    """softmax(scale * q k^T + mask) v over all tokens of a `KVView`, by `attend_sides` of backends/attend.py.

    queries: [B, n_heads, L, Dk]. mask: None, "causal" (the queries are the last L tokens), boolean or additive,
    broadcast to [B, n_heads, L, N]; of a view of latents also `KeyLogits` with its RoPE keys, which are then read
    packed. sinks: [n_heads], logits without a value (gpt-oss).

    Returns [B, n_heads, L, Dv] in the queries' dtype. Raises ValueError for shapes that do not belong together.
    """
    from ..backends.attend import attend_sides, way_of  # with the operations of the CPU fallback: when they are needed

    backend = get_backend(backend)
    way = way_of(view.keys, view.values, view.counts, queries.shape[2], backend)
    rope = _rope_part(view, mask)
    if way.startswith("restored") or rope and way_of(view.rope, view.values, view.counts, 1, backend) != way:
        rope = None  # a mask like any other: of a chunk, and where the kernel does not do the head_dim of the RoPE keys
    if view.cache is not None:
        view.cache.last_attention = way
        if view.rope is None or rope is not None:  # else the RoPE keys are restored for the mask
            view.cache.attended_version = view.version
    options = dict(
        scale=scale,
        mask=mask if rope is None else None,
        sinks=sinks,
        seed=view.seed,
        n_evicted=view.n_evicted,
        backend=backend,
        way=way,
        rope=rope,
    )
    return attend_sides(queries, view.keys, view.values, view.counts, **options)


def _rope_part(view, mask):
    """The `RopePart` of a mask that is nothing but the products with a view's RoPE keys, or None."""
    if view.rope is None or view.rope.has_means or type(mask) is not KeyLogits or mask.of.side != 1:
        return None
    of = mask.of.view
    return RopePart(mask.queries, view.rope) if of.cache is view.cache and of.version == view.version else None


def _pass_through(door, original, queries, keys, values, cache, scale, mask=None, sinks=None, **options):
    """What a door does: attention on the packed state for the arrays of a cache, `original` for anything else."""
    view = None if options or not _is_open else view_of(keys, values)
    if (
        view is not None
        and (view.keys.bits or view.values.bits or view.rope is not None)
        and (view.counts[1] or queries.shape[2] <= MAX_QUERY_TOKENS and queries.shape[2] < sum(view.counts))
        and not view.cache.undecided
    ):
        out = attend(queries, view, scale=scale, mask=mask, sinks=sinks)
        if view.cache.wants_queries and view.rope is None:
            view.cache.observe(queries, scale, sinks)
        return out
    if door in _entered.doors:  # programs that replaced each other's functions lead in a circle
        original = _own_function(_library_of(door)) or original
    _entered.doors.append(door)
    try:
        out = original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks, **options)
    finally:
        _entered.doors.pop()
    if view is not None:
        if view.rope is None:
            view.cache.observe(queries, scale, sinks)
        view.cache.last_attention = NOTHING_PACKED
    elif _is_open and isinstance(cache, TurboKVCache):
        note = {NOT_SEEN: BY_THE_MODEL, ELSEWHERE: BY_THE_MODEL, NOT_YET: NOTHING_PACKED}
        cache.last_attention = note.get(cache.last_attention, cache.last_attention)
    return out


def scaled_dot_product_attention(queries, keys, values, cache, scale, mask=None, sinks=None, **options):
    """In the place of mlx_lm.models.base.scaled_dot_product_attention, or mlx-vlm's."""
    return _pass_through(
        scaled_dot_product_attention, _original, queries, keys, values, cache, scale, mask, sinks, **options
    )


# ---- the door ----------------------------------------------------------------------------------------------------
# Other programs put their functions there too, before us or after us, and remember what they found. So a door leads to
# the function that it was put over, for good, and an uninstalled one to nothing else.
_NAME = "scaled_dot_product_attention"
_original, _library = None, "mlx_lm"  # what the first door was put over, and in which library
_doors = [scaled_dot_product_attention]
_is_open = False


class _Entered(threading.local):
    def __init__(self):
        self.doors = []


_entered = _Entered()


def install():
    """Put our scaled_dot_product_attention over the one in mlx_lm.models.base, and in every loaded model module over
    what it took from there; the same in mlx_vlm, if it is loaded. Where calls already reach ours, directly or through
    another program's function that wraps it, nothing changes. `uninstall` undoes it. Models loaded later import
    ours."""
    global _is_open
    import mlx_lm.models.base  # noqa: F401

    _is_open = True
    for library, base in _bases():
        found = getattr(base, _NAME)
        if not leads_to_a_door(found):
            setattr(base, _NAME, _door_over(found, library))
        for module in _model_modules(library):
            bound = getattr(module, _NAME)
            if bound is found or _is_own(bound, library) or any(_original_of(door) is bound for door in _doors):
                if not leads_to_a_door(bound):
                    setattr(module, _NAME, _door_over(bound, library))


def uninstall():
    """Take ours away everywhere: what it was put over is back. Functions of other programs that wrap ours stay, and
    reach what is below ours."""
    global _is_open
    _is_open = False
    for module in _model_modules():
        if (bound := getattr(module, _NAME)) in _doors:
            setattr(module, _NAME, _original_of(bound))


def is_installed():
    """Whether our attention, or a function that leads to it, is in the place of mlx-lm's or mlx-vlm's; also if neither
    is loaded."""
    bases = [base for _, base in _bases()]
    return not bases or _is_open and any(leads_to_a_door(getattr(base, _NAME)) for base in bases)


register_attention(is_installed)


def leads_to_a_door(function):
    """Whether a function is one of ours, or refers to one: as what it wraps, in its closure, its defaults, an attribute
    or a global name that its code uses."""
    return _leads_to(_doors, function)


def _leads_to(doors, function):
    seen, to_see = set(), [function]
    while to_see and len(seen) < 1000:
        item = to_see.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if any(item is door for door in doors):
            return True
        to_see += _referred(item)
    return False


def _referred(item):
    """What leads_to_a_door looks at next."""
    if isinstance(item, dict):
        return list(item.values())
    if isinstance(item, (list, tuple)):
        return list(item)
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, types.MethodType):
        return [item.__func__, item.__self__]
    if isinstance(item, types.FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or () if cell != types.CellType()]
        steps = [step for code in _codes(item.__code__) for step in dis.get_instructions(code)]
        used = [item.__globals__.get(step.argval) for step in steps if step.opname == "LOAD_GLOBAL"]
        defaults = [*(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]
        return [*cells, *defaults, *vars(item).values(), *(v for v in used if not isinstance(v, types.ModuleType))]
    if isinstance(item, (type, types.ModuleType)) or not hasattr(item, "__dict__"):
        return []
    call = getattr(type(item), "__call__", None)
    return [*vars(item).values(), *([call] if isinstance(call, types.FunctionType) else [])]


def _codes(code):
    """A function's code, and that of the functions inside it."""
    return [code, *(inner for const in code.co_consts if isinstance(const, types.CodeType) for inner in _codes(const))]


def _bases():
    """(library, its module models.base) of those that are loaded."""
    found = [(library, sys.modules.get(f"{library}.models.base")) for library in OLDEST]
    return [(library, base) for library, base in found if base]


def _model_modules(library=""):
    """Loaded modules of a library's models with an attention function, models.base among them; of both without a
    name."""
    prefixes = tuple(f"{name}.models." for name in OLDEST if library in ("", name))
    found = [module for name, module in list(sys.modules.items()) if name.startswith(prefixes)]
    return [module for module in found if callable(getattr(module, _NAME, None))]


def _is_own(function, library):
    """Whether a function is the library's own attention."""
    return isinstance(function, types.FunctionType) and (function.__module__, function.__name__) == (
        f"{library}.models.base",
        _NAME,
    )


def _own_function(library):
    """The library's own function, if a door is over it."""
    return next((function for function in map(_original_of, _doors) if _is_own(function, library)), None)


def _library_of(door):
    return _library if door is scaled_dot_product_attention else door.library


def _original_of(door):
    return _original if door is scaled_dot_product_attention else door.original


def _door_over(function, library):
    """The door that leads to a function: scaled_dot_product_attention itself, unless it is in use over another one."""
    global _original, _library
    first = scaled_dot_product_attention
    if _original is not function and not any(_leads_to([first], getattr(m, _NAME)) for m in _model_modules()):
        if _is_own(function, library) or not any(door.original is function for door in _doors[1:]):
            _original, _library = function, library
    for door in _doors:
        if _original_of(door) is function:
            return door

    def door(queries, keys, values, cache, scale, mask=None, sinks=None, **options):
        return _pass_through(door, function, queries, keys, values, cache, scale, mask, sinks, **options)

    door.original, door.library = function, library
    _doors.append(door)
    return door
