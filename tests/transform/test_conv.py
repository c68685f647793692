"""Convolutions: what the exam's layouts do not show."""

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, dense_params, primitives, random_adapter
from jax import lax

import lorax_jax as lj
from lorax_jax._errors import PlanError, TransformError
from lorax_jax.adapters import Role

X = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
KERNEL = jax.random.normal(jax.random.key(1), (3, 3, 4, 6))
GROUPED = jax.random.normal(jax.random.key(2), (3, 3, 2, 6))
LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(x, w, groups=1, **kwargs):
    return lax.conv_general_dilated(
        x,
        w,
        (1, 1),
        "SAME",
        dimension_numbers=LAYOUT,
        feature_group_count=groups,
        **kwargs,
    )


def adapted(fn, w, role, x=X, rank=5):
    """The adapted answer beside that of the dense weight."""
    params = {"w": w}
    adapter = random_adapter(jax.random.key(3), params, [role], rank=rank)
    dense = dense_params(params, [adapter])
    return lj.adapt(fn)(lj.bind(params, adapter), x), fn(dense, x)


def test_the_rank_is_the_channels_between():
    """A convolution to `rank` channels, then one product: nothing else is added."""
    params = {"w": KERNEL}
    plan = lj.plan(
        lj.LoraConfig("w", rank=5), params, lambda p, x: conv(x, p["w"]), (X,)
    )
    bound = lj.bind(params, lj.init(plan, params, key=jax.random.key(0)))
    jaxpr = jax.make_jaxpr(lj.adapt(lambda p, x: conv(x, p["w"])))(bound, X)
    found = primitives(jaxpr)
    assert (found["conv_general_dilated"], found["dot_general"]) == (2, 1)
    shapes = [v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars]
    assert (2, 8, 8, 5) in shapes and (3, 3, 4, 6) not in shapes


@pytest.mark.parametrize("precision", [None, "highest", ("default", "highest")])
def test_precision_and_result_type(precision):
    fn = lambda p, x: conv(  # noqa: E731
        x.astype(jnp.bfloat16),
        p["w"].astype(jnp.bfloat16),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    got, expected = adapted(fn, KERNEL, Role("w", (0, 1, 2), (3,)))
    assert got.dtype == jnp.float32
    assert_close(got, expected, dtype=jnp.bfloat16, length=36)


def test_one_kernel_both_ways():
    """An autoencoder with one kernel: its second use takes the factors backwards."""

    def fn(p, x):
        w, h = p["w"], jnp.tanh(conv(x, p["w"]))
        return lax.conv_general_dilated(
            h, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWOI", "NHWC")
        )

    got, expected = adapted(fn, KERNEL, Role("w", (0, 1, 2), (3,)))
    assert_close(got, expected, length=54, factor=2)
    plan = lj.plan(
        lj.LoraConfig({"w": {"tie": "shared"}}, rank=2), {"w": KERNEL}, fn, (X,)
    )
    assert plan.slots[0].role == Role("w", (0, 1, 2), (3,))


def test_a_shared_a_in_a_grouped_kernel():
    """Declared roles may give all groups one A: that is a change of the weight too."""
    fn = lambda p, x: conv(x, p["w"], groups=2)  # noqa: E731
    got, expected = adapted(fn, GROUPED, Role("w", (0, 1, 2), (3,)))
    assert_close(got, expected, length=18)


def test_one_by_one_kernels_from_matrices():
    """A matrix that a model reshapes to a kernel: the window is no axis of the leaf."""
    w = jax.random.normal(jax.random.key(4), (4, 6))
    fn = lambda p, x: conv(x, p["w"][None, None])  # noqa: E731
    got, expected = adapted(fn, w, Role("w", (0,), (1,)))
    assert_close(got, expected, length=4)


def test_split_outputs_of_a_grouped_kernel():
    """Reshapes keep the order of outputs, and with it the groups."""
    w = GROUPED.reshape(3, 3, 2, 2, 3)
    fn = lambda p, x: conv(x, p["w"].reshape(3, 3, 2, 6), groups=2)  # noqa: E731
    got, expected = adapted(fn, w, Role("w", (0, 1, 2), (3, 4), groups=2))
    assert_close(got, expected, length=18)


GROUPS = Role("w", (0, 1, 2), (3,), groups=2)


@pytest.mark.parametrize(
    ("change", "role", "weight", "message"),
    [
        (
            lambda w: conv(X, w[..., :4], groups=2),
            GROUPS,
            GROUPED,
            "some outputs of a grouped kernel are taken",
        ),
        (
            lambda w: conv(X, w.swapaxes(3, 4).reshape(3, 3, 2, 6), groups=2),
            Role("w", (0, 1, 2), (3, 4), groups=2),
            GROUPED.reshape(3, 3, 2, 2, 3),
            "the outputs of a grouped kernel change their order",
        ),
        (
            lambda w: conv(X[..., :2], w),
            GROUPS,
            GROUPED,
            "for 2 groups of outputs, and here are none",
        ),
        (
            lambda w: conv(jnp.tile(X, 2)[..., :6], w, groups=3),
            GROUPS,
            GROUPED,
            "for 2 groups of outputs, and here are 3",
        ),
        (
            lambda w: conv(X.swapaxes(0, 3), w.swapaxes(2, 3), batch_group_count=2),
            Role("w", (0, 1, 3), (2,)),
            jnp.ones((3, 3, 4, 2)),
            "`batch_group_count` = 2 gives every part",
        ),
        (
            lambda w: conv(w, jnp.ones((1, 1, 6, 2))),
            Role("w", (0, 1, 2), (3,)),
            KERNEL,
            "the weight is the image of the convolution",
        ),
        (
            lambda w: conv(X, w),
            Role("w", (0, 2), (3,), (1,)),
            KERNEL,
            "both factors run along the window",
        ),
        (
            lambda w: conv(X, w),
            Role("w", (0, 1), (2,), (3,)),
            KERNEL,
            "one factor runs along inputs and outputs",
        ),
    ],
)
def test_refusals(change, role, weight, message):
    params = {"w": weight}
    adapter = random_adapter(jax.random.key(3), params, [role])
    fn = lj.adapt(lambda p: change(p["w"]))
    with pytest.raises(TransformError, match=message):
        fn(lj.bind(params, adapter))


def test_a_plan_says_why_an_image_is_no_target():
    fn = lambda p, x: conv(p["w"], x)  # noqa: E731
    with pytest.raises(PlanError, match="the weight is the image of the convolution"):
        lj.plan(lj.LoraConfig("w"), {"w": KERNEL}, fn, (jnp.ones((1, 1, 6, 2)),))


def test_a_rank_beyond_a_group():
    fn = lambda p, x: conv(x, p["w"], groups=2)  # noqa: E731
    config = lj.LoraConfig("w", rank=4)
    with pytest.raises(PlanError, match="`rank` = 4 exceeds 3, .* in 2 groups"):
        lj.plan(config, {"w": GROUPED}, fn, (X,))


def test_a_grouped_kernel_used_without_groups_too():
    def fn(p, x):
        return conv(x, p["w"], groups=2), conv(x[..., :2], p["w"])

    with pytest.raises(PlanError, match="is multiplied in several ways"):
        lj.plan(lj.LoraConfig("w", rank=2), {"w": GROUPED}, fn, (X,))


def test_groups_that_do_not_divide():
    declared = {"w": {"inputs": (0, 1, 2), "outputs": (3,), "groups": 4}}
    with pytest.raises(PlanError, match="4 groups, into which the 6 outputs"):
        lj.plan(lj.LoraConfig("w"), {"w": GROUPED}, roles=declared)
