"""Spending a budget of bits: never more than it, nothing left that a step would take, and no better choice."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import quick

from mlx_turbo.quant.budget import WIDTHS, Part, average_bits, cheapest_widths, expected_errors
from mlx_turbo.quant.codebook import gaussian_mse, product
from mlx_turbo.quant.scheme import BUDGETS, TurboConfig, bits_per_value

ERRORS = st.dictionaries(st.sampled_from(WIDTHS), st.sampled_from([0.0]) | st.floats(1e-9, 5), min_size=1)
HEADS = st.lists(st.tuples(st.integers(1, 8), st.sampled_from([32, 64, 80, 128, 512])), min_size=1, max_size=2)
PARTS = st.lists(st.builds(Part, HEADS, ERRORS), min_size=1, max_size=8)


def costs(parts, widths):
    return sum(expected_errors(part.errors)[WIDTHS.index(width)] for part, width in zip(parts, widths))


def possible(parts, bits):
    return average_bits(parts, [2] * len(parts)) <= bits


@quick
@given(PARTS, st.floats(2.6, BUDGETS[1]))
def test_the_average_is_within_the_budget_and_no_further_step_would_be(parts, bits):
    if not possible(parts, bits):
        with pytest.raises(ValueError, match="bits: got"):
            cheapest_widths(parts, bits)
        return
    widths = cheapest_widths(parts, bits)
    assert average_bits(parts, widths) <= bits + 1e-9
    for i, width in enumerate(widths):
        if width < WIDTHS[-1]:
            more = [*widths[:i], WIDTHS[WIDTHS.index(width) + 1], *widths[i + 1 :]]
            assert average_bits(parts, more) > bits


@quick
@given(st.lists(ERRORS, min_size=1, max_size=12), st.integers(0, 1000))
def test_equal_parts_spend_exactly_what_the_smallest_step_allows(errors, thousandths):
    parts = [Part([(4, 128)], e) for e in errors]
    bits = 2.125 + 4 * thousandths / 1000  # up to 6 bits: the next step is two bits
    assert 0 <= bits - average_bits(parts, cheapest_widths(parts, bits)) + 1e-9 < 1 / len(parts) + 1e-8


@quick
@given(st.lists(st.builds(Part, HEADS, ERRORS), min_size=1, max_size=3), st.floats(2.6, BUDGETS[1]))
def test_no_other_choice_within_the_budget_costs_less(parts, bits):
    if possible(parts, bits):
        all_choices = itertools.product(WIDTHS, repeat=len(parts))
        best = min(costs(parts, w) for w in all_choices if average_bits(parts, w) <= bits + 1e-9)
        total = costs(parts, [4] * len(parts))
        assert costs(parts, cheapest_widths(parts, bits)) <= best * 1.0001 + 0.01 * total


@quick
@given(PARTS, st.floats(2.6, BUDGETS[1]), st.floats(0, 2))
def test_more_bits_never_cost_more(parts, bits, more):
    if possible(parts, bits):
        total = costs(parts, [4] * len(parts))
        less, greater = (costs(parts, cheapest_widths(parts, b)) for b in (bits, bits + more))
        assert greater <= less * 1.0001 + 0.01 * total


@quick
@given(ERRORS)
def test_errors_are_as_measured_unless_more_bits_would_cost_more(errors):
    expected = expected_errors(errors)
    assert expected == sorted(expected, reverse=True)
    assert all(expected[WIDTHS.index(width)] <= error for width, error in errors.items())


def test_errors_that_were_not_measured_follow_the_rounding():
    at = dict(zip(WIDTHS, expected_errors({3: 0.01})))
    assert at[3] == 0.01
    for width in WIDTHS:
        assert at[width] == pytest.approx(0.01 * gaussian_mse(product(width)) / gaussian_mse(product(3)))
    assert dict(zip(WIDTHS, expected_errors({3: 5.0, 4: 2.0, 5: 0.01})))[4] == 2.0


def test_a_part_that_costs_nothing_gives_its_bits_to_one_that_does():
    widths = cheapest_widths([Part([(2, 64)], {3: 0.0}), Part([(2, 64)], {3: 0.1})], 4.25)
    assert widths == [2, 6]


def test_the_average_counts_codes_and_scales():
    parts = [Part([(8, 128)], {4: 1.0}), Part([(1, 512), (1, 64)], {4: 1.0})]
    assert average_bits(parts[:1], [4]) == bits_per_value(4, 128) == 4.125
    assert average_bits(parts[1:], [3]) == pytest.approx((512 * 3 + 16 + 64 * 3 + 16) / 576)


# ---- the configuration ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", ["", "abc", "1", "1.99", "8.6", "20", "nan", "inf", "-4", "0x4"])
def test_budgets_that_make_no_sense_are_refused(bits):
    with pytest.raises(ValueError, match=rf"scheme: got 'auto:{bits}', allowed are auto:BITS with BITS from 2 to 8.5"):
        TurboConfig(f"auto:{bits}")


def test_a_budget_is_a_configuration_of_a_model():
    config = TurboConfig("auto:4.5", sink=2)
    assert (config.name, config.budget, config.schemes, config.auto) == ("auto:4.5", 4.5, None, False)
    assert TurboConfig(budget=4.5, sink=2) == config and TurboConfig.of("auto:4.50", sink=2) == config
    with pytest.raises(
        ValueError, match=r"config: got 'auto:4.5', .* mlx_turbo.choose_bits\(model, tokens, 'auto:4.5'\)"
    ):
        config.for_layer(0, 2)


def test_each_layer_gets_its_own_scheme():
    config = TurboConfig("auto:4.5", schemes=["turbo4", "turbo6v3"], recent=9)
    assert hash(config) == hash(TurboConfig("auto:4.5", schemes=["turbo4", "turbo6v3"], recent=9))
    assert [config.for_layer(i, 2) for i in (0, 1)] == [TurboConfig(s, recent=9) for s in ("turbo4", "turbo6v3")]
    with pytest.raises(ValueError, match="schemes: got 2, and the model has 3 layers"):
        config.for_layer(0, 3)


@pytest.mark.parametrize("options", [dict(scheme="turbo3"), dict(auto=True), dict(boundary=1)])
@pytest.mark.parametrize("of_all", [dict(budget=4.5), dict(schemes=["turbo4"])])
def test_nothing_else_says_how_many_bits_a_layer_gets(options, of_all):
    with pytest.raises(ValueError, match=f"{next(iter(of_all))}: says how many bits every layer gets"):
        TurboConfig(**options, **of_all)


@pytest.mark.parametrize("budget", [True, "4.5x", [4], 1.5])
def test_a_budget_is_a_number(budget):
    with pytest.raises(ValueError, match="budget: got .*, allowed are numbers from 2 to 8.5"):
        TurboConfig(budget=budget)
