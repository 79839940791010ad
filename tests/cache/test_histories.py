"""The long run of the state machines that do to a cache, in any order, what mlx-lm does to it; its steps count."""

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from support.caches import FAST_BACKENDS, STEPS
from support.machines import BatchMachine, CacheMachine, WindowMachine, WindowsMachine
from support.strategies import quick

EXAMPLES = {CacheMachine: 110, WindowMachine: 60, BatchMachine: 60, WindowsMachine: 60}  # of at most 50 steps
MERGES = "go_on_from_a_batch", "merge_what_is_extracted", "extend"


@pytest.mark.slow
@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
def test_ten_thousand_steps_leave_every_cache_as_lists_of_tokens(backend, door, short_segments):
    STEPS.clear()
    for machine, examples in EXAMPLES.items():
        run_state_machine_as_test(machine, settings=settings(quick, max_examples=examples, stateful_step_count=50))
    assert STEPS.total() >= 10_000, STEPS
    for machine in EXAMPLES:
        of_it = {rule: n for (name, rule), n in STEPS.items() if name == machine.__name__}
        assert sum(of_it.values()) >= 2_000
        assert of_it["trim"] >= 30 and of_it["go_on_with_a_copy"] >= 60, of_it  # a third of these by a file
        assert sum(n for rule, n in of_it.items() if rule in MERGES) >= 60, of_it
    print(f"{STEPS.total()} steps")
