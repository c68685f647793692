"""A plan promises nothing that `adapt` refuses."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lorax_jax as lj
from lorax_jax._errors import PlanWarning, TransformError

D = 6
PARAMS = {"w": jnp.ones((D, D)), "v": jnp.ones((D, D))}
X = jnp.ones((3, D))


@jax.custom_vjp
def project(w, x):
    return x @ w


project.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))


def custom(params, x):
    return project(params["w"], x) @ params["v"]


def opaque(params, x):
    like = jax.ShapeDtypeStruct(params["w"].shape, jnp.float32)
    return x @ params["w"] @ jax.pure_callback(lambda w: w, like, params["w"])


def changing(params, x):
    def step(carry, _):
        w, x = carry
        return (w * 0.5, jnp.tanh(x @ w)), None

    return lax.scan(step, (params["w"], x), None, length=2)[0][1]


def partly(params, x):
    w = params["w"]
    return x @ w + x @ lax.cond(x.sum() > 0, lambda: w, lambda: jnp.ones_like(w))


def decayed(params, x):
    return (x @ params["w"]).sum() + (params["w"] ** 2).sum()


CASES = [
    (custom, "derivative of its own", {"custom": "primal"}),
    (custom, "derivative of its own", {"custom": "materialize"}),
    (opaque, "a callback hands the dense", {"materialize": ("pure_callback",)}),
    (changing, "changes step by step", {"materialize": "scan"}),
    (partly, "some branches and a plain array", {"materialize": "allow"}),
    (decayed, "no rule covers", {"materialize": "allow"}),
]


@pytest.mark.parametrize("fn, reason, options", CASES)
def test_what_adapt_refuses_a_plan_warns_of(key, fn, reason, options):
    """With `adapt`'s own words; and what `adapt` is allowed, a plan may be told."""
    config = lj.LoraConfig("w", rank=1, tie="shared")
    with pytest.warns(PlanWarning, match=reason) as caught:
        plan = lj.plan(config, PARAMS, fn, (X,))
    bound = lj.bind(PARAMS, lj.init(plan, PARAMS, key=key))
    with pytest.raises(TransformError, match=reason) as refused:
        lj.adapt(fn)(bound, X)
    assert len(caught) == 1 and str(refused.value) in str(caught[0].message)
    allowed = lj.plan(config, PARAMS, fn, (X,), **options)  # a warning is an error here
    assert list(allowed) == list(plan)
    lj.adapt(fn, **options)(bound, X)


def test_weights_that_are_no_targets_may_go_anywhere():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lj.plan(lj.LoraConfig("v", rank=1), PARAMS, custom, (X,))


def test_a_rehearsal_traces_the_function_no_second_time():
    calls = []

    def fn(params, x, flag, scale=1.0):
        calls.append(flag)
        return x @ params["w"] * scale

    config = lj.LoraConfig("w", rank=1)
    lj.plan(config, PARAMS, fn, (X, "a string"), {"scale": 2.0})
    assert calls == ["a string"]
