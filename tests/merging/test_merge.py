"""Merging rounds once, says what was lost, and never touches the base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, equations, random_adapter
from reference import dense

import lorax_jax as lj
from lorax_jax._errors import AdapterError
from lorax_jax.adapters import Adapted, Role

ROLE = Role("w", (0,), (1,))


@pytest.fixture
def params(key):
    return {"w": jax.random.normal(key, (64, 48)), "b": jnp.ones(3)}


@pytest.fixture
def adapter(key, params):
    return random_adapter(key, params, [ROLE], rank=6)


def exact(params, adapter):
    """The merged weight in float64."""
    train = adapter.train["w"]
    w = params["w"].astype(jnp.float32)
    return dense(w, train["a"], train["b"], adapter.fixed["w"]["scale"], (0,), (1,))


def test_bfloat16_is_rounded_once(params, adapter):
    """Bit for bit the float64 sum rounded once, except where that sum lies within
    float32 error of a rounding boundary."""
    params = {"w": params["w"].astype(jnp.bfloat16)}
    merged = lj.merge(params, adapter)["w"]
    assert merged.dtype == jnp.bfloat16
    want = exact(params, adapter)
    # What float32 may be off by: one rounding for each product and sum of an entry.
    train, scale = adapter.train["w"], adapter.fixed["w"]["scale"]
    sizes = map(
        np.abs, (params["w"].astype(jnp.float32), train["a"], train["b"], scale)
    )
    slack = 4 * np.finfo(np.float32).eps * dense(*sizes, (0,), (1,))
    low, high = (
        jnp.asarray(want + s, jnp.float32).astype(jnp.bfloat16) for s in (-slack, slack)
    )
    boundary = np.asarray(low != high)
    assert boundary.mean() < 0.01
    rounded = jnp.asarray(want, jnp.float32).astype(jnp.bfloat16)
    assert np.array_equal(merged[~boundary], rounded[~boundary])
    assert bool(((merged == low) | (merged == high)).all())


def test_float32_merge_is_exact_to_rounding(params, adapter):
    assert_close(lj.merge(params, adapter)["w"], exact(params, adapter), length=6)


def test_products_run_at_the_highest_precision(params, adapter):
    """CPU tests cannot see TF32 or bfloat16 passes; the jaxpr can."""
    jaxpr = jax.make_jaxpr(lj.merge)(params, adapter)
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    highest = jax.lax.Precision.HIGHEST
    assert [e.params["precision"] for e in products] == [(highest, highest)]


def test_the_base_is_never_touched(params, adapter):
    before = {name: np.array(w) for name, w in params.items()}
    leaves = jax.tree.leaves(params)
    for scale in (1.0, -1.0) * 50:
        merged = lj.merge(params, adapter, weights=[scale])
    assert all(x is y for x, y in zip(leaves, jax.tree.leaves(params), strict=True))
    assert all(np.array_equal(before[name], w) for name, w in params.items())
    assert merged["b"] is params["b"]


def test_weights_and_several_adapters(key, params, adapter):
    other = random_adapter(jax.random.key(5), params, [ROLE], rank=2)
    merged = lj.merge(params, adapter, other, weights=[2.0, -0.5])["w"]
    want = params["w"] + 2 * (exact(params, adapter) - params["w"])
    want = want - 0.5 * (exact(params, other) - params["w"])
    assert_close(merged, want)
    none = lj.merge(params, adapter, adapter, weights=[1.0, -1.0])["w"]
    assert_close(none, params["w"])


def test_the_report(params, adapter):
    low = {"w": params["w"].astype(jnp.bfloat16)}
    tiny = jax.tree.map(lambda x: x * 1e-3, adapter.train)
    _, (report,) = lj.merge(low, lj.Adapter(tiny, adapter.fixed), report=True)
    assert report.path == "w" and report.lost > 0.5 and report.relative_error > 0.5
    _, (fine,) = lj.merge(params, adapter, report=True)
    assert fine.lost < 0.01 and fine.relative_error < 1e-5 and fine.max_error < 1e-6


def test_safe_refuses_what_is_not_finite(params, adapter):
    bad = {
        "w": adapter.train["w"] | {"b": adapter.train["w"]["b"].at[0, 0].set(jnp.inf)}
    }
    with pytest.raises(AdapterError, match="Merging into 'w' gives NaN or infinity"):
        lj.merge(params, lj.Adapter(bad, adapter.fixed), safe=True)


def test_one_use_of_a_tied_weight_cannot_be_merged(key, params):
    role = Role("w", (0,), (1,), lookup=True, use="lookup")
    adapter = random_adapter(key, params, [role])
    with pytest.raises(AdapterError, match="one use of a tied weight only"):
        lj.merge(params, adapter)


@pytest.mark.parametrize("use, other", [("lookup", "head"), ("head", "lookup")])
def test_one_use_is_left_alone_by_the_other(key, use, other):
    """An adapter of the lookup leaves the head bit-equal to the base, and so on."""
    params = {"w": jax.random.normal(key, (9, 4))}
    ids, x = jnp.array([[1, 8]]), jnp.ones((2, 4))

    def fn(params):
        return {"lookup": jnp.take(params["w"], ids, axis=0), "head": x @ params["w"].T}

    config = lj.LoraConfig("w", rank=2, tie=use, init=False)
    plan = lj.plan(config, params, fn)
    adapter = lj.init(plan, params, key=key)
    base, got = fn(params), lj.adapt(fn)(lj.bind(params, adapter))
    assert np.array_equal(got[other], base[other])
    assert not np.allclose(got[use], base[use])


def test_binding_refuses_what_does_not_fit(params, adapter):
    with pytest.raises(AdapterError, match="(?s)adapts 'w', which.*closest  b"):
        lj.bind({"b": params["b"]}, adapter)
    with pytest.raises(
        AdapterError, match="(?s)does not fit the weight.*weight  shape \\(3,\\)"
    ):
        lj.bind({"w": params["b"]}, adapter)
    with pytest.raises(AdapterError, match="does not fit the weight"):
        lj.bind({"w": params["w"][:5]}, adapter)
    with pytest.raises(AdapterError, match="`weights` has 2 entries for 1"):
        lj.bind(params, adapter, weights=[1.0, 2.0])
    with pytest.raises(AdapterError, match="got a dict where an `Adapter`"):
        lj.bind(params, adapter.train)
    with pytest.raises(AdapterError, match="name different weights: \\['w'\\]"):
        lj.bind(params, lj.Adapter({}, adapter.fixed))


def test_binding_copies_nothing(params, adapter):
    bound = lj.bind(params, adapter)
    assert bound["w"].base is params["w"] and bound["b"] is params["b"]
    again = lj.bind(bound, adapter)
    assert isinstance(again["w"], Adapted) and len(again["w"].terms) == 2
    assert_close(lj.merge(bound, adapter)["w"], lj.merge(params, adapter, adapter)["w"])
