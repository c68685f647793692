"""Spectra of weights, statistics and gradients against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, numbers

import lorax_jax as lj
from lorax_jax.adapters import Fixed
from lorax_jax.errors import PlanError
from lorax_jax.planning import Spectra, layer_matrices
from lorax_jax.statistics import GradientFactors, Moments, SecondMoment

D, F = 6, 4


def energies(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False) ** 2


@pytest.fixture
def model():
    """A stack, experts, a fused leaf in two parts, and a grouped convolution."""
    params = {
        "layers": numbers(jax.random.key(0), (3, D, D)),
        "experts": numbers(jax.random.key(1), (2, D, F)),
        "fused": numbers(jax.random.key(2), (D, 2 * F)),
        "grouped": numbers(jax.random.key(3), (3, 2, D)),
    }

    def fn(params, x, line):
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"])
        e = jnp.einsum("ebd,edf->ebf", jnp.stack([x, x]), params["experts"])
        y = jax.lax.conv_general_dilated(
            line,
            params["grouped"],
            (1,),
            "SAME",
            dimension_numbers=("NHC", "HIO", "NHC"),
            feature_group_count=2,
        )
        return e, x @ params["fused"], y

    targets = {
        "layers|experts|grouped": {"rank": 2},
        "fused": {"parts": {"q": {1: (0, F)}, "v": {1: (F, 2 * F)}}, "rank": 1},
    }
    args = jnp.ones((5, D)), jnp.ones((2, 5, 4))
    plan = lj.plan(lj.LoraConfig(targets), params, fn, args)
    return plan, params


def test_weights(model):
    plan, params = model
    found = lj.spectra(plan, params)
    expected = {f"{i}/layers": energies(params["layers"][i]) for i in range(3)}
    expected["experts"] = sum(energies(w) for w in params["experts"])
    expected["fused@q"] = energies(params["fused"][:, :F])
    expected["fused@v"] = energies(params["fused"][:, F:])
    groups = params["grouped"].reshape(6, 2, 3)
    expected["grouped"] = sum(energies(groups[:, i]) for i in range(2))
    assert set(found) == {site.name for site in plan} == set(expected)
    for name, values in expected.items():
        assert_close(found[name], values, length=64)
        assert found.totals[name] == pytest.approx(values.sum(), rel=1e-5)
    assert found["0/layers"].sum() == pytest.approx(
        (np.asarray(params["layers"][0]) ** 2).sum(), rel=1e-5
    )


def test_matrices_are_those_of_the_factors(model):
    """With the weight itself for A and ones for B, merging doubles the weight."""
    plan, params = model
    train, fixed = {}, {}
    for slot in plan.slots:
        weight = jnp.stack(
            [
                layer_matrices(params[slot.role.path], i, slot.role)
                for i in range(len(slot.sites))
            ]
        )
        d_out = slot.sides[1]
        one = jnp.broadcast_to(jnp.eye(d_out), (*weight.shape[:-2], d_out, d_out))
        a, b = slot.arrays(weight, one)
        train[slot.name] = {"a": a, "b": b}
        numbers = {"scale": jnp.ones(slot.layers), "rank": jnp.ones(slot.layers)}
        fixed[slot.name] = Fixed(slot.role, numbers)
    merged = lj.merge(params, lj.Adapter(train, fixed))
    assert_close(merged, {name: 2 * leaf for name, leaf in params.items()})


def test_statistics(model):
    _, params = model
    stat, rows = Moments(), numbers(jax.random.key(5), (50, D))
    state = stat.init(D)
    state = stat.update(state, stat.observe(rows, None, stat.context(state)))
    small = lj.plan(
        lj.LoraConfig(["layers"], rank=2),
        {"layers": params["layers"]},
        lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["layers"])[0],
        (rows,),
    )
    stacked = jax.tree.map(lambda x: jnp.stack([x, 4 * x, x]), state)
    found = lj.spectra(small, stats={"layers": stacked})
    variances = np.sort(np.linalg.eigvalsh(np.cov(rows.T, bias=True)))[::-1]
    assert_close(found["0/layers"], variances[:4], length=50)  # twice the rank
    assert found.totals["0/layers"] == pytest.approx(variances.sum(), rel=1e-4)
    assert found.explained("0/layers", 2) == pytest.approx(
        variances[:2].sum() / variances.sum(), rel=1e-4
    )
    assert len(lj.spectra(small, stats={"layers": stacked}, size=1)["1/layers"]) == 1


def test_gradients():
    plan = lj.plan(
        lj.LoraConfig("w", rank=1),
        {"w": jnp.ones((D, F))},
        lambda p, x: x @ p["w"],
        (jnp.ones(D),),
    )
    gradient = numbers(jax.random.key(0), (D, F))
    factors = GradientFactors(*jnp.linalg.svd(gradient, full_matrices=False))
    found = lj.spectra(plan, stats={"w": factors})
    assert_close(found["w"], energies(gradient), length=D)


def test_explained():
    spectra = Spectra.of({"w": [3.0, 1.0], "zero": [0.0, 0.0]})
    assert spectra.explained("w", 1) == 0.75 and spectra.explained("w", 9) == 1.0
    assert spectra.explained("zero", 1) == 1.0
    assert spectra.captured({"w": 1, "zero": 2}) == 3.0


def test_refuses(model):
    plan, params = model
    with pytest.raises(PlanError, match="give one of the two"):
        lj.spectra(plan)
    with pytest.raises(PlanError, match="give one of the two"):
        lj.spectra(plan, params, stats={})
    other = params | {"fused": params["fused"][:-1]}
    match = r"'fused' with shape \(6, 8\), and `params` has \(5, 8\)\. Give"
    with pytest.raises(PlanError, match=match):
        lj.spectra(plan, other)
    match = r"`params` has no such leaf\. Give"
    with pytest.raises(PlanError, match=match):
        lj.spectra(plan, {})
    match = r"'.*' is known by its type alone, and its singular .* parameters themsel"
    with pytest.raises(PlanError, match=match):
        lj.spectra(plan, jax.eval_shape(lambda: params))
    broken = params | {"layers": params["layers"].at[1, 0, 0].set(jnp.nan)}
    with pytest.raises(PlanError, match="spectrum of '1/layers' is not finite"):
        lj.spectra(plan, broken)
    with pytest.raises(PlanError, match="`stats` has nothing for '.*'. Closest: other"):
        lj.spectra(plan, stats={"other": None})
    states = {slot.name: SecondMoment().init(D) for slot in plan.slots}
    with pytest.raises(PlanError, match="SecondMomentState, knows no principal"):
        lj.spectra(plan, stats=states)
    factors = GradientFactors(jnp.ones((D, 1)), jnp.ones(1), jnp.ones((1, D)))
    states = {slot.name: factors for slot in plan.slots}
    match = r"has the leading axes \(\), and the plan \([23],\)\. Gather it"
    with pytest.raises(PlanError, match=match):
        lj.spectra(plan, stats=states)
