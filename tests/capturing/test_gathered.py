"""What was gathered knows its model: `init` refuses it for another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import numbers

import lorax_jax as lj
from lorax_jax.capturing import Gathered, eva, prepare
from lorax_jax.errors import CaptureError, PlanError
from lorax_jax.statistics import Moments

KEY = jax.random.key(0)
PARAMS = {"v": numbers(KEY, (6, 8)), "w": numbers(KEY, (8, 5))}
OTHER = PARAMS | {"w": PARAMS["w"].at[0, 0].add(1)}  # an entry that is looked at
XS = [numbers(jax.random.key(i), (12, 6)) for i in range(2)]


def fn(params, x):
    return jnp.tanh(x @ params["v"]) @ params["w"]


def test_weights_that_hold_nan_are_not_another_model():
    """They have a message of their own."""
    params = PARAMS | {"w": jnp.full_like(PARAMS["w"], jnp.nan)}
    stats = lj.capture(fn, plan_of("corda"), stat=Moments()).run(params, XS)
    with pytest.raises(PlanError, match="makes of 'w' hold NaN or infinity"):
        lj.init(plan_of("corda"), params, key=KEY, stats=stats)


def loss(params, x):
    return (fn(params, x) ** 2).mean()


def plan_of(init):
    config = lj.LoraConfig("[vw]", rank=2, init=init)
    return lj.plan(config, PARAMS, fn, (XS[0],))


def gathered(way, init):
    plan = plan_of(init)
    if way == "prepare":
        return prepare(plan, PARAMS, fn, XS, loss=loss)
    if way == "eva":
        found = eva(plan, PARAMS, fn, XS, tau=0.0, rho=1)
        return found.plan, found.states
    if way == "capture":
        return plan, lj.capture(fn, plan, stat=Moments()).run(PARAMS, XS)
    return plan, lj.capture_grad(loss, plan).run(PARAMS, XS)


WAYS = [
    ("prepare", "eva"),
    ("prepare", "corda"),
    ("prepare", "lora_ga"),
    ("eva", "eva"),
    ("capture", "corda_kpm"),
    ("capture_grad", "lora_ga"),
]


@pytest.mark.parametrize("way, init", WAYS)
def test_what_another_model_gave_is_refused(way, init):
    plan, stats = gathered(way, init)
    assert isinstance(stats, Gathered)
    lj.init(plan, PARAMS, key=KEY, stats=stats)
    match = r"'w' were gathered on another model: .* Gather them on the parameters that"
    with pytest.raises(PlanError, match=match):
        lj.init(plan, OTHER, key=KEY, stats=stats)


@pytest.mark.parametrize("way, init", WAYS)
def test_it_is_a_tree_that_keeps_what_it_knows(way, init):
    """Through `jit`, and from its arrays alone."""
    plan, stats = gathered(way, init)
    through = jax.jit(lambda x: x)(stats)
    leaves = [np.asarray(x) for x in jax.tree.leaves(stats)]
    restored = jax.tree.unflatten(jax.tree.structure(stats), leaves)
    for one in (through, restored):
        assert list(one) == ["v", "w"] and len(one) == 2
        lj.init(plan, PARAMS, key=KEY, stats=one)
        with pytest.raises(PlanError, match="gathered on another model"):
            lj.init(plan, OTHER, key=KEY, stats=one)


def test_ranks_distributed_anew_leave_what_is_known_of_the_rest():
    """The site without a rank is gone from both."""
    params = {"v": jnp.eye(6), "w": jnp.eye(6)}

    def both(params, x):
        return x.at[:, 2:].multiply(1e-3) @ params["v"], x @ params["w"]

    config = lj.LoraConfig("[vw]", rank=1, init="eva")
    plan = lj.plan(config, params, both, (XS[0],))
    xs = [jax.random.normal(KEY, (60, 6))]  # two directions of v, six of w
    found, stats = prepare(plan, params, both, xs, rho=2.0)
    assert set(stats) == set(stats.witness) == {site.name for site in found} == {"v"}
    with pytest.raises(PlanError, match="'v' were gathered on another model"):
        lj.init(found, {"v": 2 * params["v"]}, key=KEY, stats=stats)


def test_a_stack_is_told_apart_too():
    params = {"layers": numbers(KEY, (3, 6, 6))}

    def scanned(params, x):
        step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return jax.lax.scan(step, x, params["layers"])[0].sum()

    config = lj.LoraConfig("layers", rank=2, init="lora_ga")
    plan = lj.plan(config, params, scanned, (XS[0],))
    stats = prepare(plan, params, None, XS, loss=scanned).stats
    other = {"layers": params["layers"] + 1}
    with pytest.raises(PlanError, match="'layers' were gathered on another model"):
        lj.init(plan, other, key=KEY, stats=stats)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_gradients_of_parameters_that_change(after):
    """In a pass, between two, and in the second one."""
    capture = lj.capture_grad(loss, plan_of("lora_ga"), passes=2)
    given = [PARAMS] * after + [OTHER] * (4 - after)

    def run():
        state = capture.init()
        for params, x in zip(given[:2], XS, strict=True):
            state = capture.update(state, params, x)
        state = capture.next_pass(state)
        for params, x in zip(given[2:], XS, strict=True):
            state = capture.update(state, params, x)
        return capture.finish(state)

    with pytest.raises(CaptureError, match=r"parameters changed while gradients were"):
        run()


@pytest.mark.parametrize("call", [prepare, eva])
def test_arguments_in_another_order(call):
    match = rf"`{call.__name__}\(plan, params, fn, batches\)` has a function for its"
    with pytest.raises(CaptureError, match=match):
        call(fn, plan_of("eva"), PARAMS, XS)
