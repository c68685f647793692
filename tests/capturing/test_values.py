"""Types in place of parameters are refused, and traced values are not."""

import jax
import jax.numpy as jnp
import pytest

import lorax_jax as lj
from lorax_jax.capturing import eva, prepare
from lorax_jax.errors import CaptureError
from lorax_jax.statistics import Moments

PARAMS = {"v": jnp.ones((6, 8)), "w": jnp.ones((8, 5))}
TYPES = jax.eval_shape(lambda: PARAMS)
X = jnp.arange(72.0).reshape(12, 6) % 5


def fn(params, x):
    return jnp.tanh(x @ params["v"]) @ params["w"]


def loss(params, x):
    return (fn(params, x) ** 2).mean()


def plan_of(init):
    return lj.plan(lj.LoraConfig("w", rank=1, init=init), TYPES, fn, (X,))


def gather():
    return lj.capture(fn, plan_of("eva"), stat=Moments())


@pytest.mark.parametrize(
    "call",
    [
        lambda: gather()(gather().init(), TYPES, X),
        lambda: gather().run(TYPES, [X]),
        lambda: lj.capture_grad(loss, plan_of("lora_ga")).run(TYPES, [X]),
        lambda: prepare(plan_of("corda"), TYPES, fn, [X]),
        lambda: prepare(plan_of("lora_ga"), TYPES, fn, [X], loss=loss),
        lambda: eva(plan_of("eva"), TYPES, fn, [X]),
        # One leaf is enough, be it one that is not adapted.
        lambda: gather().run(PARAMS | {"v": TYPES["v"]}, [X]),
    ],
)
def test_types_are_refused(call):
    match = r"types in place of values, .*: v(, w)?\. .* give the parameters themselves"
    with pytest.raises(CaptureError, match=match):
        call()


def test_the_types_of_what_is_gathered_need_no_values():
    stats = jax.eval_shape(gather(), gather().init(), TYPES, X)
    assert stats["w"].scatter == jax.ShapeDtypeStruct((8, 8), "float32")
    capture = lj.capture_grad(loss, plan_of("lora_ga"))
    state = jax.eval_shape(capture.init)
    found = jax.eval_shape(capture.update, state, TYPES, X)
    assert jax.tree.leaves(found) == jax.tree.leaves(state)
