"""How the tokens of a cache's last update were attended, for reports; and a warning where that was not by mlx_turbo.

A cache's `last_attention` is what attention says it did: "fused", or "tiles", "restored" or "exact" and why. NOT_YET:
no packed tokens were returned since. NOT_SEEN: some were, and attention has not seen them. ELSEWHERE: it has not seen
those of several updates.
"""

import warnings
from typing import Callable, Optional

NOT_YET = "nothing yet"
NOT_SEEN: Optional[str] = None
NOTHING_PACKED = "exact: nothing is packed"
BY_THE_MODEL = "restored: the model makes other arrays of its keys and values"
ELSEWHERE = "not by mlx_turbo: if a model attends to the cache, it reads restored tokens"

_is_installed: Callable[[], bool] = lambda: True  # noqa: E731
_warned = False


def register_attention(is_installed: Callable[[], bool]) -> None:
    """is_installed: whether our attention is in mlx-lm's place. mlx_turbo.integration.attention says so."""
    global _is_installed
    _is_installed = is_installed


def after_update(last: Optional[str], is_packed: bool) -> Optional[str]:
    """The new `last_attention` of a cache that was updated, after what `last` says; is_packed: whether it returned
    packed tokens. Warns, once in a process, if two updates follow each other without our attention, and it is not in
    mlx-lm's place."""
    global _warned
    if not is_packed:
        return NOT_YET
    if last not in (NOT_SEEN, ELSEWHERE):
        return NOT_SEEN
    if not _warned and not _is_installed():
        _warned = True
        warnings.warn(
            "a TurboKVCache is used without mlx_turbo's attention: a model that attends to it restores all tokens at "
            "every step. Before the model is called: mlx_turbo.enable(model)",
            stacklevel=4,  # whoever called update_and_fetch
        )
    return ELSEWHERE
