"""Convolutional networks as Flax writes them."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers import assert_close

import lorax_jax as lj
from lorax_jax.adapters import Role

X = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))

IN_LAST, OUT = (0, 1, 2), (3,)
LAYERS = {
    "conv": (nn.Conv(6, (3, 3)), IN_LAST, OUT, 1),
    "strided": (nn.Conv(6, (3, 2), strides=2, padding="VALID"), IN_LAST, OUT, 1),
    "dilated": (nn.Conv(6, (3, 3), kernel_dilation=2), IN_LAST, OUT, 1),
    "circular": (nn.Conv(6, (3, 3), padding="CIRCULAR"), IN_LAST, OUT, 1),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=2), IN_LAST, OUT, 2),
    "depthwise": (nn.Conv(8, (3, 3), feature_group_count=4), IN_LAST, OUT, 4),
    "transposed": (nn.ConvTranspose(6, (3, 3), strides=(2, 2)), IN_LAST, OUT, 1),
    "transposed kernel": (
        nn.ConvTranspose(6, (3, 3), strides=(2, 2), transpose_kernel=True),
        (0, 1, 3),
        (2,),
        1,
    ),
    # Rows of a signal: Flax folds the second axis into the batch.
    "one axis": (nn.Conv(6, (3,)), (0, 1), (2,), 1),
}


def check(fn, params, args, plan):
    """Gradients move every factor, and the merged model is the adapted one."""
    adapter = lj.init(plan, params, key=jax.random.key(1))
    adapted = lj.adapt(fn)

    def loss(train):
        out = adapted(lj.bind(params, lj.Adapter(train, adapter.fixed)), *args)
        return jnp.sin(out).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter.train)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))
    assert_close(out, fn(lj.merge(params, adapter), *args), length=64, factor=2)


@pytest.mark.parametrize("name", LAYERS)
def test_linen(name, relaxed):
    layer, inputs, outputs, groups = LAYERS[name]
    params = layer.init(jax.random.key(0), X)
    config = lj.LoraConfig("all-linear", rank=2, init=False)
    plan = lj.plan(config, params, layer.apply, (X,))
    path = "params/kernel"
    assert [s.role for s in plan] == [Role(path, inputs, outputs, groups=groups)]
    check(layer.apply, params, (X,), plan)


@pytest.mark.parametrize(
    ("make", "inputs", "outputs", "groups"),
    [
        (lambda r: nnx.Conv(4, 6, (3, 3), strides=2, rngs=r), IN_LAST, OUT, 1),
        (
            lambda r: nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=r),
            IN_LAST,
            OUT,
            2,
        ),
        (lambda r: nnx.ConvTranspose(4, 6, (3, 3), rngs=r), IN_LAST, OUT, 1),
    ],
    ids=["conv", "grouped", "transposed"],
)
def test_nnx(make, inputs, outputs, groups, relaxed):
    full, params, state = lj.functional(make(nnx.Rngs(0)))
    fn = lambda params, state, x: full(params, state, x)[0]  # noqa: E731
    config = lj.LoraConfig("all-linear", rank=2, init=False)
    plan = lj.plan(config, params, fn, (state, X))
    assert [s.role for s in plan] == [Role("kernel", inputs, outputs, groups=groups)]
    check(fn, params, (state, X), plan)


class Net(nn.Module):
    """A stem, a separable block with batch norm, a head."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), strides=2, name="stem")(x)
        y = nn.Conv(16, (3, 3), feature_group_count=8, name="depthwise")(x)
        y = nn.BatchNorm(use_running_average=not train)(y)
        x = x + nn.Conv(8, (1, 1), name="pointwise")(nn.relu(y))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def test_a_network_trains_and_merges(relaxed):
    model = Net()
    variables = model.init(jax.random.key(0), X)
    config = lj.LoraConfig(
        {".*/depthwise/kernel": {"rank": 1}, "all-linear": {}}, rank=3, alpha=6
    )
    plan = lj.plan(config, variables, model.apply, (X,))
    assert [(s.path.split("/")[1], s.rank, s.trainable) for s in plan] == [
        ("depthwise", 1, 8 * 9 + 16),
        ("head", 3, 3 * (8 + 5)),
        ("pointwise", 3, 3 * (16 + 8)),
        ("stem", 3, 3 * (36 + 8)),
    ]
    assert "0,1,2 -> 3 in 8 groups" in str(plan)
    adapter = lj.init(plan, variables, key=jax.random.key(1))
    assert_close(
        lj.adapt(model.apply)(lj.bind(variables, adapter), X),
        model.apply(variables, X),
    )
    labels = jnp.array([1, 3])
    tx = optax.adamw(1e-2)

    def loss(train, variables):
        bound = lj.bind(variables, lj.Adapter(train, adapter.fixed))
        logits, changed = lj.adapt(model.apply)(
            bound, X, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, labels
        ).mean(), changed

    @jax.jit
    def step(train, state, variables):
        (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(
            train, variables
        )
        updates, state = tx.update(grads, state, train)
        return optax.apply_updates(train, updates), state, variables | changed, value

    train, state, values = adapter.train, tx.init(adapter.train), []
    for _ in range(6):
        train, state, variables, value = step(train, state, variables)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    trained = lj.Adapter(train, adapter.fixed)
    got = lj.adapt(model.apply)(lj.bind(variables, trained), X)
    merged = model.apply(lj.merge(variables, trained), X)
    assert_close(got, merged, length=72, factor=4)
    assert float(jnp.abs(merged - model.apply(variables, X)).max()) > 1e-3
