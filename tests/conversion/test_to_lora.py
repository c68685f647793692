"""Adapters with starting or frozen factors as plain LoRA."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn, started
from helpers import tolerance

import lorax_jax as lj
from lorax_jax._errors import AdapterError, PlanError
from lorax_jax.adapters import Fixed
from lorax_jax.planning import fitted

LAYERS, D_IN, D_OUT = 3, 12, 10
# Layers of one stack at ranks 2, 3 and 4, beside a kernel of its own.
RULES = {
    "h/0/w": {"rank": 2},
    "h/1/w": {"rank": 3, "alpha": 5},
    "h/2/w": {},
    "out": {"rank": 3},
}


def model(params, x):
    for i in range(LAYERS):
        x = x + jnp.tanh(x @ params["h"]["w"][i]) @ params["h"]["back"][i]
    return x @ params["out"]


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0)

    def numbers(*shape):
        return jnp.asarray(draw.normal(0, 0.3, shape), jnp.float32)

    return {
        "h": {"w": numbers(LAYERS, D_IN, D_OUT), "back": numbers(LAYERS, D_OUT, D_IN)},
        "out": numbers(D_IN, D_OUT),
    }


X = jnp.asarray(np.random.default_rng(1).normal(0, 1, (5, D_IN)), jnp.float32)


def plan_of(params, **config: Any):
    whole = lj.LoraConfig(RULES, rank=4, alpha=7, **config)
    return lj.plan(whole, params, model, (X,))


def output(params, adapter):
    return np.asarray(lj.adapt(model)(lj.bind(params, adapter), X))


@pytest.mark.parametrize("rslora", [False, True])
def test_it_computes_the_same(params, rslora):
    plan = plan_of(params, rslora=rslora)
    adapter = started(plan)
    plain = lj.to_lora(adapter)
    assert not any({"a0", "b0"} & set(site) for site in plain.fixed.values())
    assert np.asarray(plain.fixed["h/w"]["rank"]).tolist() == [4, 6, 8]
    wanted = output(params, adapter)
    assert np.abs(wanted - np.asarray(model(params, X))).max() > 0.1  # it acts
    np.testing.assert_allclose(
        output(params, plain), wanted, rtol=0, atol=tolerance(jnp.float32, D_IN, 4)
    )
    # The same numbers, so merging the one that has no pads inside gives the same bits.
    merged = lj.merge(params, adapter)["out"]
    np.testing.assert_array_equal(lj.merge(params, plain)["out"], merged)


def test_pads_are_behind_the_true_ranks(params):
    adapter = started(plan_of(params))
    plain = lj.to_lora(adapter)
    a, a0 = adapter.train["h/w"]["a"], adapter.fixed["h/w"]["a0"]
    b, b0 = adapter.train["h/w"]["b"], adapter.fixed["h/w"]["b0"]
    new = plain.train["h/w"]
    for layer, r in enumerate((2, 3, 4)):
        halves = a0[layer, :, :r], (a - a0)[layer, :, :r]
        np.testing.assert_array_equal(
            new["a"][layer, :, : 2 * r], np.concatenate(halves, axis=1)
        )
        halves = (b - b0)[layer, :r], b[layer, :r]
        np.testing.assert_array_equal(
            new["b"][layer, : 2 * r], np.concatenate(halves, axis=0)
        )
        assert not np.asarray(new["a"])[layer, :, 2 * r :].any()
        assert not np.asarray(new["b"])[layer, 2 * r :].any()


def test_traced_ranks(params):
    adapter = started(plan_of(params))
    jitted, eager = jax.jit(lj.to_lora)(adapter), lj.to_lora(adapter)
    assert jax.tree.structure(jitted) == jax.tree.structure(eager)
    for x, y in zip(jax.tree.leaves(jitted), jax.tree.leaves(eager), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(AdapterError, match="`report` looks at values"):
        jax.jit(lambda adapter: lj.to_lora(adapter, rank=2, report=True)[0])(adapter)


@pytest.mark.parametrize("rslora", [False, True])
def test_its_plan(params, rslora):
    plan = plan_of(params, rslora=rslora)
    adapter = started(plan)
    new = fitted(plan, lj.to_lora(adapter))
    for old, site in zip(plan, new, strict=True):
        assert site.rank == 2 * old.rank
        assert site.alpha == old.alpha * (np.sqrt(2) if rslora else 2)
        assert np.float32(site.scale) == np.float32(old.scale)
        assert site.trainable == 2 * old.trainable
    assert fitted(plan, adapter) == plan


def test_the_plan_of_a_rescaled_adapter(params):
    plan = plan_of(params)
    train, fixed = drawn(plan)
    half = {n: Fixed(f.role, {**f, "scale": f["scale"] / 2}) for n, f in fixed.items()}
    for old, site in zip(plan, fitted(plan, lj.Adapter(train, half)), strict=True):
        assert site.scale == pytest.approx(old.scale / 2, rel=1e-7)
        assert site.alpha == pytest.approx(old.alpha / 2, rel=1e-7)


def test_plans_of_others_are_refused(params):
    plan = plan_of(params)
    train, fixed = drawn(plan)
    less = lj.Adapter({"out": train["out"]}, {"out": fixed["out"]})
    with pytest.raises(PlanError, match=r"differ about \['h/w'\]"):
        fitted(plan, less)
    with pytest.raises(PlanError, match="is being traced"):
        jax.jit(lambda adapter: len(fitted(plan, adapter)))(lj.Adapter(train, fixed))


def test_plain_adapters_come_back(params):
    adapter = drawn(plan_of(params))
    for plain in (lj.to_lora(adapter), lj.to_lora(adapter, rank=1)):
        assert plain.train == adapter.train
        assert all(plain.fixed[name] is adapter.fixed[name] for name in plain.fixed)


def test_frozen_factors_are_trained_afterwards(params):
    adapter = started(plan_of(params), frozen=("b",))
    assert set(adapter.train["out"]) == {"a"}
    plain = lj.to_lora(adapter)
    assert set(plain.train["out"]) == {"a", "b"} and "b" not in plain.fixed["out"]
    np.testing.assert_array_equal(plain.fixed["h/w"]["rank"], [2, 3, 4])
    np.testing.assert_array_equal(output(params, plain), output(params, adapter))
    assert plain.train["out"]["b"] is not adapter.fixed["out"]["b"]  # to be donated


def test_magnitudes_stay(params):
    plan = plan_of(params, dora=True)
    adapter = started(plan, params)
    plain = lj.to_lora(adapter)
    for name, train in adapter.train.items():
        assert plain.train[name]["magnitude"] is train["magnitude"]
        assert plain.fixed[name]["norm"] is adapter.fixed[name]["norm"]
    wanted = output(params, adapter)
    np.testing.assert_allclose(
        output(params, plain), wanted, rtol=0, atol=tolerance(jnp.float32, D_IN, 8)
    )


def reference_cut(delta, rank):
    """The best approximation of a dense change, and its error."""
    u, s, vt = np.linalg.svd(delta)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], np.sqrt((s[rank:] ** 2).sum())


def deltas(adapter, name):
    """What is added to each layer, the slow way."""
    train, fixed = adapter.train[name], adapter.fixed[name]
    a, b, scale = (np.asarray(x, np.float64) for x in (train["a"], train["b"], 1.0))
    scale = np.asarray(fixed["scale"], np.float64)[..., None, None]
    whole = scale * (a @ b)
    if "a0" in fixed:
        a0, b0 = (np.asarray(fixed[n], np.float64) for n in ("a0", "b0"))
        whole = whole - scale * (a0 @ b0)
    return whole.reshape(-1, *whole.shape[-2:])


@pytest.mark.parametrize("rank", [1, 3, 5, 50])
def test_the_cut_is_the_best_one(params, rank):
    adapter = started(plan_of(params))
    cut, report = lj.to_lora(adapter, rank=rank, report=True)
    lines = {(line.name, line.layer): line for line in report}
    assert len(report) == LAYERS + 1
    for name in adapter.fixed:
        ranks = np.atleast_1d(adapter.fixed[name]["rank"])
        stacked = name == "h/w"
        for i, (delta, found) in enumerate(
            zip(deltas(adapter, name), deltas(cut, name), strict=True)
        ):
            line = lines[name, (i,) if stacked else ()]
            assert line.rank == min(rank, 2 * ranks[i])
            wanted, error = reference_cut(delta, line.rank)
            size = np.linalg.norm(delta)
            limit = size * tolerance(jnp.float32, D_IN)
            assert np.abs(found - wanted).max() <= limit
            assert abs(line.error - error) <= limit
            assert abs(line.relative_error - error / size) <= limit / size
    held = np.atleast_1d(cut.fixed["h/w"]["rank"])
    for layer, r in enumerate(held):
        assert not np.asarray(cut.train["h/w"]["a"])[layer, :, r:].any()
        assert not np.asarray(cut.train["h/w"]["b"])[layer, r:].any()


def test_an_exact_conversion_reports_no_error(params):
    _, report = lj.to_lora(started(plan_of(params)), report=True)
    assert [line.rank for line in report] == [4, 6, 8, 6]
    assert all(line.error == line.relative_error == 0 for line in report)


def test_the_product_is_never_built(params):
    adapter = started(plan_of(params))
    text = str(jax.make_jaxpr(lambda x: lj.to_lora(x, rank=2))(adapter))
    assert f"{D_IN},{D_OUT}]" not in text and f"{D_OUT},{D_IN}]" not in text
    assert f"{D_IN},8]" in text  # the thin ones are there


def test_experts_groups_and_several_axes():
    """Experts and groups have matrices of their own; axes flatten within them."""
    params = {
        "e": jnp.ones((3, 4, 2, 5)),  # experts, in, in, out
        "g": jnp.ones((3, 2, 6)),  # window, in, out in two groups
    }
    roles = {
        "e": {"inputs": (1, 2), "outputs": (3,), "batch": (0,)},
        "g": {"inputs": (0, 1), "outputs": (2,), "groups": 2},
    }
    plan = lj.plan(lj.LoraConfig(["e", "g"], rank=2), params, roles=roles)
    adapter = started(plan)
    cut, report = lj.to_lora(adapter, rank=3, report=True)
    before, after = (lj.merge(params, one) for one in (adapter, cut))

    def changes(name):
        return (np.asarray(x[name] - params[name], np.float64) for x in (before, after))

    change, kept = changes("e")
    errors = []
    for one, other in zip(change.reshape(3, 8, 5), kept.reshape(3, 8, 5), strict=True):
        wanted, error = reference_cut(one, 3)
        errors.append(error)
        assert np.abs(other - wanted).max() < 1e-5
    lines = {line.name: line for line in report}
    assert lines["e"].error == pytest.approx(np.linalg.norm(errors), abs=1e-5)
    change, kept = (
        np.asarray(x["g"] - params["g"], np.float64) for x in (before, after)
    )
    for group in range(2):
        one, other = (
            x[..., 3 * group :][..., :3].reshape(6, 3) for x in (change, kept)
        )
        assert np.abs(other - reference_cut(one, 3)[0]).max() < 1e-5
    # Three outputs have no more than three directions: nothing is lost.
    assert lines["g"].relative_error < 1e-5


def test_half_a_start_is_refused(params):
    train, fixed = started(plan_of(params))
    half = {n: x for n, x in fixed["out"].items() if n != "b0"}
    fixed["out"] = Fixed(fixed["out"].role, half)
    with pytest.raises(AdapterError, match=r"'out' lacks \['b0'\]"):
        lj.to_lora(lj.Adapter(train, fixed))


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "2"])
def test_ranks_that_are_none(params, rank):
    with pytest.raises(AdapterError, match="a rank is an integer from 1 up"):
        lj.to_lora(drawn(plan_of(params)), rank=rank)
