"""Ranks by explained variance, and the mask of tokens that count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_jax as lj
from lorax_jax.capturing import label_mask, redistribute
from lorax_jax.errors import CaptureError, PlanError
from lorax_jax.planning import Spectra

SHAPES = {"u": (16, 12), "v": (16, 12), "w": (16, 6)}
SPECTRA = {
    "u": [0.50, 0.20, 0.10, 0.05, 0.01, 0.01],
    "v": [0.30, 0.25, 0.15, 0.12, 0.08, 0.02],
    "w": [0.04, 0.03, 0.02, 0.01, 0.01, 0.01],
}


def plan_of(rank=3, shapes=SHAPES, targets=r"[u-z]", **options):
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    roles = {k: {"inputs": (0,), "outputs": (1,)} for k in shapes}
    config = lj.LoraConfig(targets, rank=rank, **options)
    return lj.plan(config, params, roles=roles)


def numbers(plan):
    return {site.name: (site.rank, site.alpha, site.scale) for site in plan}


def reference(spectra, most, budget):
    """Directions one by one, the largest first."""
    pool = [
        (-value, i, name)
        for i, name in enumerate(spectra)
        for value in spectra[name][: most[name]]
    ]
    found = dict.fromkeys(spectra, 0)
    for _, _, name in sorted(pool)[:budget]:
        found[name] += 1
    return found


def test_the_largest_of_all_are_taken():
    found = redistribute(plan_of(alpha=6), SPECTRA)
    # The nine largest: u 0.5 0.2 0.1 0.05, v all but its last.
    assert numbers(found) == {"u": (4, 8.0, 2.0), "v": (5, 10.0, 2.0)}
    assert found.config == plan_of(alpha=6).config


@pytest.mark.parametrize("seed", range(6))
def test_beside_a_slow_reference(seed):
    rng = np.random.default_rng(seed)
    plan = plan_of(rank=2)
    spectra = {n: np.sort(rng.random(6))[::-1] for n in SHAPES}
    budget, rho = int(rng.integers(1, 12)), float(rng.uniform(1, 3))
    most = {n: min(round(2 * rho), min(SHAPES[n])) for n in SHAPES}
    expected = reference(spectra, most, budget)
    found = redistribute(plan, spectra, budget=budget, rho=rho)
    assert {s.name: s.rank for s in found} == {n: r for n, r in expected.items() if r}


def test_rho_caps_ranks_and_rounds_halves_to_even():
    """`round(2.5) == 2`, as in PEFT."""
    spectra = {"u": [0.9] * 3, "v": [0.1] * 3}
    plan = plan_of(rank=1, shapes={"u": (16, 12), "v": (16, 12)})
    found = redistribute(plan, spectra, rho=2.5, budget=3)
    assert {s.name: s.rank for s in found} == {"u": 2, "v": 1}
    same = redistribute(plan, spectra, rho=1)
    assert numbers(same) == numbers(plan)


def test_a_rank_is_no_more_than_a_weight_can_have():
    spectra = {"w": [0.9] * 10, "u": [0.1] * 10}
    found = redistribute(plan_of(rank=5, targets="[uw]"), spectra)
    assert {s.name: s.rank for s in found} == {"u": 4, "w": 6}


def test_scales():
    """Kept by alphas that follow; not so with rslora, nor with alphas that stay."""
    plan = plan_of(alpha=6, rslora=True)
    found = numbers(redistribute(plan, SPECTRA))
    assert found["v"] == (5, 10.0, 10.0 / np.sqrt(5))
    found = numbers(redistribute(plan_of(alpha=6), SPECTRA, adjust_scale=False))
    assert found["v"] == (5, 6.0, 6.0 / 5)


def test_sites_that_share_an_input():
    """Offer the same: one budget is short by goes to the first; caps are shared."""
    plan = plan_of(targets={"u": {"rank": 1}, "v": {"rank": 3}})
    spectra = {"u": SPECTRA["v"], "v": SPECTRA["v"]}
    for group in (("u", "v"), ("v", "u")):
        found = redistribute(plan, spectra, budget=7, shared=[group])
        assert {s.name: s.rank for s in found} == {group[0]: 4, group[1]: 3}
    apart = redistribute(plan, spectra, budget=7)
    assert {s.name: s.rank for s in apart} == {"u": 2, "v": 5}


def test_sites_that_are_not_named_stay():
    found = redistribute(plan_of(), {n: SPECTRA[n] for n in "uv"}, budget=2)
    assert {s.name: s.rank for s in found} == {"u": 1, "v": 1, "w": 3}


@pytest.mark.parametrize(
    "spectra, options, error, match",
    [
        (SPECTRA, {"rho": 0.5}, PlanError, r"`rho` = 0.5; a number from 1 up"),
        (SPECTRA, {"rho": np.nan}, PlanError, r"`rho` = nan"),
        (SPECTRA, {"budget": 0}, PlanError, r"`budget` = 0; a number from 1 up"),
        ({"x": [1.0]}, {}, PlanError, r"'x' is no site .* has a rank. Closest: "),
        (SPECTRA, {"shared": [("u", "x")]}, PlanError, r"'x' is no site"),
        ({"u": [0.5, 0.1]}, {}, CaptureError, r"spectrum of 'u' .*\(2,\).* rank is 3"),
        ({"u": [0.1, 0.5, 0.1]}, {}, PlanError, r"descending .* up: \[0.1, 0.5, 0.1\]"),
        ({"u": [np.nan] * 6}, {}, PlanError, r"spectrum of 'u' is not finite"),
        ({"u": {}}, {}, PlanError, r"of 'u' is a dict and no .* numbers. Of what"),
        ({"u": [0.5, 0.1, -1.0]}, {}, PlanError, r"from 0 up: \[0.5, 0.1, -1.0\]"),
    ],
)
def test_what_does_not_fit(spectra, options, error, match):
    with pytest.raises(error, match=match):
        redistribute(plan_of(), spectra, **options)


def test_spectra_compete_by_their_shares():
    """Not by how large a site's inputs are."""
    sizes = {name: 10.0**i for i, name in enumerate(SPECTRA)}
    energies = {n: sizes[n] * np.asarray(v) for n, v in SPECTRA.items()}
    found = redistribute(plan_of(), Spectra(energies, sizes))
    assert [s.rank for s in found] == [s.rank for s in redistribute(plan_of(), SPECTRA)]


def test_label_mask():
    labels = jnp.array([[-100, 5, -100, 7], [1, 2, 3, 4]])
    tokens = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    expected = np.array([[0, 1, 0, 0], [1, 1, 1, 1]], np.float32)
    np.testing.assert_array_equal(jax.jit(label_mask)(tokens, labels), expected)
    np.testing.assert_array_equal(label_mask(tokens), tokens)
    np.testing.assert_array_equal(label_mask(labels=labels)[0], [0, 1, 0, 1])
    np.testing.assert_array_equal(label_mask(labels=labels, ignored=7)[0], [1, 1, 1, 0])
    assert label_mask(tokens, labels).dtype == jnp.float32
    with pytest.raises(ValueError, match="neither `attention_mask` nor `labels`"):
        label_mask()
