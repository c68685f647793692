"""Ragged products: what the exam's layouts do not show."""

import jax
import jax.numpy as jnp
import pytest
from helpers import Counter, assert_close, dense_params, primitives, random_adapter
from jax import lax

import lorax_jax as lj
from lorax_jax._errors import PlanError, TransformError
from lorax_jax.adapters import Role

X = jax.random.normal(jax.random.key(0), (7, 8))
W = jax.random.normal(jax.random.key(1), (3, 8, 6))
SIZES = jnp.array([2, 1, 4])
ROLE = Role("w", (1,), (2,), (0,))


def bound(role=ROLE, w=W, **kwargs):
    params = {"w": w}
    adapter = random_adapter(jax.random.key(3), params, [role], **kwargs)
    return lj.bind(params, adapter), dense_params(params, [adapter])


def experts(p, x, sizes=SIZES):
    return lax.ragged_dot(x, p["w"], sizes)


def test_two_ragged_products_more():
    params, _ = bound(rank=5)
    jaxpr = jax.make_jaxpr(lj.adapt(experts))(params, X, SIZES)
    found = primitives(jaxpr)
    assert found["ragged_dot_general"] == 3 and found["dot_general"] == 0
    shapes = [v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars]
    assert (7, 5) in shapes and W.shape not in shapes


def test_sizes_are_data():
    """Other groups run the same program."""
    params, dense = bound()
    counted = Counter(lj.adapt(experts))
    step = jax.jit(lambda *args: counted(*args))
    for sizes in (SIZES, jnp.array([0, 7, 0]), jnp.array([5, 1, 1])):
        assert_close(step(params, X, sizes), experts(dense, X, sizes))
    assert counted.calls == 1


def test_gradients_of_the_input():
    params, dense = bound()

    def loss(fn, p):
        return jax.grad(lambda x: jnp.sum(jnp.sin(fn(p, x))))(X)

    assert_close(loss(lj.adapt(experts), params), loss(experts, dense), factor=8)


def test_rows_beyond_the_groups():
    """Rows that no group takes: whatever the model's product makes of them, zeros."""
    sizes = jnp.array([2, 1, 2])
    params, dense = bound()
    got = lj.adapt(experts)(params, X, sizes)
    assert_close(got[:5], experts(dense, X, sizes)[:5])


@pytest.mark.parametrize(
    "role",
    [Role("w", (1,), (0, 2)), Role("w", (0, 1), (2,))],
    ids=["shared_a", "shared_b"],
)
def test_one_factor_for_all_groups(role):
    """Declared roles may let the groups share a factor."""
    params, dense = bound(role)
    assert_close(lj.adapt(experts)(params, X), experts(dense, X), length=24)


def test_precision_and_result_type():
    def fn(p, x):
        x, w = x.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16)
        return lax.ragged_dot(
            x, w, SIZES, precision="highest", preferred_element_type=jnp.float32
        )

    params, dense = bound()
    got = lj.adapt(fn)(params, X)
    assert got.dtype == jnp.float32
    assert_close(got, fn(dense, X), dtype=jnp.bfloat16)


def ragged(x, w, contract, batch, rows, group):
    numbers = lax.RaggedDotDimensionNumbers((contract, batch), rows, group)
    return lax.ragged_dot_general(x, w, SIZES, numbers)


@pytest.mark.parametrize(
    ("change", "role", "shape", "message"),
    [
        (
            lambda w: ragged(X.T, w, ((1,), (0,)), ((), ()), [1], []),
            Role("w", (0,), (1,)),
            (7, 6),
            "the groups divide the axis that is summed over",
        ),
        (
            lambda w: ragged(
                jnp.ones((7, 2, 8)), w, ((2,), (1,)), ((0,), (0,)), [0], []
            ),
            Role("w", (1,), (2,), (0,)),
            (7, 8, 6),
            "the groups divide an axis that runs in parallel",
        ),
        (
            lambda w: lax.ragged_dot(w, jnp.ones((3, 8, 2)), SIZES),
            Role("w", (1,), (0,)),
            (7, 8),
            "the weight's own rows are in groups",
        ),
    ],
    ids=["contracting", "batch", "rows"],
)
def test_refusals(change, role, shape, message):
    w = jax.random.normal(jax.random.key(1), shape)
    params, dense = bound(role, w)
    fn = lambda p: change(p["w"])  # noqa: E731
    fn(dense)  # a fine model
    with pytest.raises(TransformError, match=message):
        lj.adapt(fn)(params)
    with pytest.raises(PlanError, match=message):
        lj.plan(lj.LoraConfig("w", rank=1), {"w": w}, fn)


def test_all_linear_takes_experts():
    plan = lj.plan(lj.LoraConfig("all-linear", rank=2), {"w": W}, experts, (X,))
    assert [site.role for site in plan] == [ROLE]
    assert plan.trainable == 3 * 2 * (8 + 6)
