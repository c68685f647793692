"""Ranks under a budget, against all choices that there are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorax_jax as lj
from lorax_jax.allocating import greedy
from lorax_jax.errors import PlanError
from lorax_jax.statistics import Moments, SecondMoment


def gained(gains, counts):
    return sum(sum(g[:n]) for g, n in zip(gains, counts, strict=True))


def paid(costs, counts):
    return sum(c * n for c, n in zip(costs, counts, strict=True))


def best(gains, costs, budget, least):
    """The slow and obvious form: every choice."""
    ranges = [range(n, len(g) + 1) for g, n in zip(gains, least, strict=True)]
    allowed = (c for c in itertools.product(*ranges) if paid(costs, c) <= budget)
    return max(gained(gains, counts) for counts in allowed)


@st.composite
def problems(draw):
    """Small lists of descending gains, integers so that sums are exact."""
    n = draw(st.integers(1, 4))
    lists = st.lists(st.integers(0, 40), min_size=1, max_size=4)
    gains = [sorted(draw(lists), reverse=True) for _ in range(n)]
    costs = [draw(st.integers(1, 6)) for _ in range(n)]
    least = [draw(st.integers(0, min(1, len(g)))) for g in gains]
    return gains, costs, paid(costs, least) + draw(st.integers(0, 40)), least


def not_affordable(gains, costs, budget, least):
    """Gain of the first item, by gain per cost, that the budget has no room for."""
    items = [
        (-gain / costs[j], j, i, gain)
        for j, g in enumerate(gains)
        for i, gain in enumerate(g)
        if i >= least[j] and gain > 0
    ]
    left = budget - paid(costs, least)
    for _, j, _, gain in sorted(items):
        if costs[j] > left:
            return gain
        left -= costs[j]
    return 0


@settings(max_examples=150, deadline=None)
@given(problems())
def test_never_over_the_budget_and_close_to_the_best(problem):
    gains, costs, budget, least = problem
    counts = greedy(gains, costs, budget, least)
    assert paid(costs, counts) <= budget
    assert all(n >= m for n, m in zip(counts, least, strict=True))
    short = best(gains, costs, budget, least) - gained(gains, counts)
    bound = not_affordable(gains, costs, budget, least)
    assert 0 <= short < bound or short == bound == 0


@settings(max_examples=100, deadline=None)
@given(problems())
def test_the_best_where_costs_are_equal(problem):
    gains, costs, budget, least = problem
    costs = [3] * len(costs)
    budget = max(budget, paid(costs, least))
    counts = greedy(gains, costs, budget, least)
    assert gained(gains, counts) == best(gains, costs, budget, least)


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 10))
def test_a_larger_budget_captures_no_less(problem, more):
    gains, costs, budget, least = problem
    before = gained(gains, greedy(gains, costs, budget, least))
    assert gained(gains, greedy(gains, costs, budget + more, least)) >= before


def test_ties_go_to_the_first_and_nothing_is_spent_for_nothing():
    assert greedy([[4.0, 2.0], [4.0, 2.0]], [1, 1], 3) == [2, 1]
    assert greedy([[4.0, 0.0], [0.0]], [1, 1], 9) == [1, 0]
    assert greedy([], [], 9) == []


# Plans.

D, F = 6, 4
SIZES = {"q": (D, F), "v": (D, F), "up": (D, 5 * D)}


def make_plan(**config):
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in SIZES.items()}
    roles = {n: {"inputs": (0,), "outputs": (1,)} for n in SIZES}
    config = {"rank": 2, "alpha": 6} | config
    return lj.plan(lj.LoraConfig(list(SIZES), **config), params, roles=roles)


SPECTRA = {"q": [9.0, 8.0, 7.0, 0.5], "v": [5.0, 1.0], "up": [20.0, 4.0]}


def ranks(plan):
    return {site.name: site.rank for site in plan}


def test_the_budget_is_in_bytes_of_the_plan():
    plan = make_plan()
    # By gain per value: q 0.9, 0.8, 0.7; up 20 / 36; v 0.5; up 4 / 36; v 0.1; q 0.05.
    order = ["q", "q", "q", "up", "v", "up", "v", "q"]
    spent, expected = 0, {"q": 0, "v": 0, "up": 0}
    for name in order:
        expected[name] += 1
        spent += 4 * sum(SIZES[name])
        found = lj.allocate(plan, SPECTRA, budget=spent)
        assert ranks(found) == {n: r for n, r in expected.items() if r}
        assert 4 * found.trainable == spent
    half = lj.allocate(make_plan(dtype=jnp.bfloat16), SPECTRA, budget=spent // 2)
    assert ranks(half) == ranks(found)


def test_a_number_of_ranks():
    """All ranks cost the same, as in EVA's redistribution."""
    found = lj.allocate(make_plan(), SPECTRA, ranks=4)
    assert ranks(found) == {"q": 3, "up": 1}


def test_bounds():
    plan = make_plan()
    found = lj.allocate(plan, SPECTRA, ranks=6, smallest=1, largest=2)
    assert ranks(found) == {"q": 2, "v": 2, "up": 2}
    # A smallest rank that the spectrum does not have is taken all the same.
    found = lj.allocate(plan, SPECTRA | {"v": [5.0]}, ranks=6, smallest=2)
    assert ranks(found) == {"q": 2, "v": 2, "up": 2}
    # What a weight cannot have is not.
    long = {name: np.ones(50) for name in SPECTRA}
    assert ranks(lj.allocate(plan, long, ranks=99)) == {"q": F, "v": F, "up": D}


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_stays_or_alpha_does(rslora):
    plan = make_plan(rslora=rslora)
    (before,) = {site.scale for site in plan}
    for site in lj.allocate(plan, SPECTRA, ranks=6):
        assert site.scale == pytest.approx(before, rel=1e-12)
    for site in lj.allocate(plan, SPECTRA, ranks=6, keep="alpha"):
        assert site.alpha == 6 and site.scale == plan.config.scale(site.rank, 6)


def test_sites_without_a_spectrum_keep_their_rank_and_cost():
    plan = make_plan()
    kept = 4 * 2 * sum(SIZES["up"])
    spectra = {name: SPECTRA[name] for name in ("q", "v")}
    found = lj.allocate(plan, spectra, budget=kept + 4 * 2 * (D + F))
    assert ranks(found) == {"q": 2, "up": 2}


def test_layers_of_a_stack_differ_and_experts_cost_together(key):
    params = {"w": jnp.ones((3, 2, D, F))}

    def fn(params, x):
        def layer(x, w):
            y = jnp.einsum("ebd,edf->ebf", x, w)
            return x + jnp.pad(y, ((0, 0), (0, 0), (0, D - F))), None

        return jax.lax.scan(layer, x, params["w"])[0]

    x = jnp.ones((2, 5, D))
    plan = lj.plan(lj.LoraConfig("w", rank=1), params, fn, (x,))
    spectra = {"0/w": [1.0, 0.5], "1/w": [9.0, 8.0, 7.0], "2/w": [2.0]}
    one = 2 * (D + F) * 4
    found = lj.allocate(plan, spectra, budget=5 * one + 3)
    assert ranks(found) == {"0/w": 1, "1/w": 3, "2/w": 1}
    assert 4 * found.trainable == 5 * one
    adapter = lj.init(found, params, key=key)
    assert adapter.fixed["w"]["rank"].tolist() == [1, 3, 1]


def test_the_plan_says_how_much_ranks_explain():
    plan = make_plan()
    assert "explained" not in str(plan)
    found = str(lj.allocate(plan, {"q": [6, 3, 1], "v": [3, 1]}, ranks=5)).splitlines()
    assert found[0].split()[-1] == "explained"
    shares = {line.split()[0]: line.split()[-2:] for line in found[2:5]}
    assert shares["q"] == ["90.0", "%"] and shares["v"] == ["75.0", "%"]
    assert shares["up"][-1] == "-"
    stack = lj.plan(
        lj.LoraConfig(r"\d/w", rank=1),
        {"0": {"w": jnp.ones((3, 3))}, "1": {"w": jnp.ones((3, 3))}},
        lambda p, x: x @ p["0"]["w"] @ p["1"]["w"],
        (jnp.ones(3),),
    )
    printed = str(stack.with_spectra({"0/w": [1, 1], "1/w": [4, 1]}))
    assert "50.0 to 80.0 %" in printed
    assert stack.with_spectra({"0/w": [1]}) == stack


@pytest.mark.parametrize(
    "options, match",
    [
        ({}, "takes one limit: .* Got `budget` = None and `ranks` = None"),
        ({"budget": 9, "ranks": 9}, "takes one limit"),
        ({"budget": 0}, "`budget` = 0; an integer from 1 up"),
        ({"ranks": 2.0}, r"`ranks` = 2\.0; an integer from 1 up"),
        ({"ranks": 2, "smallest": -1}, "`smallest` = -1; an integer from 0 up"),
        (
            {"ranks": 2, "largest": 0},
            "`largest` = 0 leaves no rank from `smallest` = 0",
        ),
        ({"ranks": 2, "keep": "all"}, "`keep` = 'all'; one of 'scale', 'alpha'"),
        ({"ranks": 2, "smallest": 1}, "budget of 2 ranks is too small: .* takes 3"),
        ({"budget": 30}, "budget of 30 bytes leaves no site a rank: one costs 40"),
    ],
)
def test_refuses_limits(options, match):
    with pytest.raises(PlanError, match=match):
        lj.allocate(make_plan(), SPECTRA, **options)


@pytest.mark.parametrize(
    "values, match",
    [
        ([1.0, 2.0], "not a descending one of values from 0 up"),
        ([1.0, -1.0], "not a descending one"),
        ([1.0, np.nan], "spectrum of 'q' is not finite"),
        ([], r"has the shape \(0,\)"),
        ([[1.0]], r"has the shape \(1, 1\)"),
    ],
)
def test_refuses_spectra(values, match):
    with pytest.raises(PlanError, match=match):
        lj.allocate(make_plan(), {"q": values}, ranks=4)


def test_refuses_spectra_of_other_sites():
    match = "given for 'k', which is no site .* Closest: "
    with pytest.raises(PlanError, match=match):
        lj.allocate(make_plan(), SPECTRA | {"k": [1.0]}, ranks=4)
    with pytest.raises(PlanError, match=match):
        make_plan().with_spectra({"k": [1.0]})


@pytest.mark.parametrize("stat", [Moments(), SecondMoment()])
def test_statistics_are_no_spectra(stat):
    """The way out works, where the statistic has a spectrum."""
    params = {"q": jnp.eye(6), "v": jnp.eye(6)[:, :4]}

    def fn(params, x):
        return x @ params["q"] @ params["v"]

    x = jnp.arange(48.0).reshape(8, 6) % 7
    plan = lj.plan(lj.LoraConfig("[qv]", rank=2), params, fn, (x,))
    stats = lj.capture(fn, plan, stat=stat).run(params, [x])
    name = type(stats["q"]).__name__
    match = rf"of 'q' is a {name} and no sequence .* `lj.spectra\(plan, stats=stats\)`"
    with pytest.raises(PlanError, match=match):
        lj.allocate(plan, stats, ranks=4)
    if isinstance(stat, Moments):
        found = lj.allocate(plan, lj.spectra(plan, stats=stats), ranks=4)
        assert sum(site.rank for site in found) == 4


@pytest.mark.parametrize(
    "spectra, match",
    [
        ([9.0, 1.0], r"`spectra` is a list; a mapping is meant, from names of sites"),
        (None, r"`spectra` is a NoneType; .*`lj.spectra\(plan, params\)` gives one"),
        ({"q": {"a": 1.0}}, r"of 'q' is a dict and no sequence of numbers"),
        ({"q": "9 1"}, r"of 'q' is a str and no sequence of numbers"),
        ({"q": [[1.0], [1.0, 2.0]]}, r"of 'q' is a list and no sequence of numbers"),
    ],
)
def test_what_is_no_spectrum(spectra, match):
    with pytest.raises(PlanError, match=match):
        lj.allocate(make_plan(), spectra, ranks=4)
