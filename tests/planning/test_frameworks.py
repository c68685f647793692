"""Models as Flax writes them: Linen with its lifted transforms, NNX with its state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers import assert_close
from steps import paths, stand

import lorax_jax as lj

X = jax.random.normal(jax.random.key(0), (4, 3, 6))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.remat(nn.Dense)(6)(x)), None


class Linen(nn.Module):
    """Boxes, a lifted scan and remat, statistics, dropout, general kernels."""

    axis: int = 0

    @nn.compact
    def __call__(self, x, train=False):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = nn.Dense(6, kernel_init=init)(x)
        axes = {"params": self.axis}
        x, _ = nn.scan(Layer, axes, split_rngs={"params": True}, length=3)()(x, None)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.DenseGeneral((2, 4))(x).reshape(*x.shape[:2], 8)
        return nn.MultiHeadDotProductAttention(2, qkv_features=8)(x)


@pytest.fixture(params=[0, 1], ids=["axis_0", "axis_1"])
def linen(request, relaxed):
    model = Linen(request.param)
    variables = model.init(jax.random.key(0), X)
    config = lj.LoraConfig("params/.*kernel", rank=2, init=False)
    plan = lj.plan(config, variables, model.apply, (X,))
    return model, variables, plan, lj.init(plan, variables, key=jax.random.key(1))


def test_linen_evaluates(linen):
    model, variables, plan, adapter = linen
    stack = [s for s in plan.slots if s.layers]
    assert [s.layers for s in stack] == [(3,)] and len(plan) == 9
    got = lj.adapt(model.apply)(lj.bind(variables, adapter), X)
    assert_close(got, model.apply(lj.merge(variables, adapter), X), factor=8)


def test_linen_stands(linen):
    """In training, statistics are among the outputs, and dropout has its keys."""
    model, variables, _, _ = linen
    kwargs = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(2)}}
    x = X * jnp.arange(3.0)[:, None]
    targets = "params/.*kernel"
    stand(model.apply, variables, x, targets=targets, train=True, **kwargs)


def test_linen_trains(linen):
    """`train=True`, mutable collections, rngs: everything `apply` takes."""
    model, variables, _, adapter = linen
    kwargs = {
        "train": True,
        "mutable": ["batch_stats"],
        "rngs": {"dropout": jax.random.key(2)},
    }

    def loss(train):
        bound = lj.bind(variables, lj.Adapter(train, adapter.fixed))
        out, changed = lj.adapt(model.apply)(
            bound, X * jnp.arange(3.0)[:, None], **kwargs
        )
        return (out**2).mean(), changed

    (value, changed), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        adapter.train
    )
    merged = lj.merge(variables, adapter)
    out, expected = model.apply(merged, X * jnp.arange(3.0)[:, None], **kwargs)
    assert_close(value, (out**2).mean(), factor=16)
    assert_close(changed, expected, factor=16)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Einsum("bsd,dnh->bsnh", (6, 2, 4), rngs=rngs)

    def __call__(self, x, *, deterministic=False):
        for block in self.blocks:
            x = nnx.tanh(block(x))
        return self.out(self.drop(self.norm(x), deterministic=deterministic))


@pytest.fixture
def module(relaxed):
    return Nnx(nnx.Rngs(0))


def values(tree):
    """Copies on the host, of keys too."""

    def value(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(value, tree)


def test_functional_is_pure(module):
    """Calls change the state that they return, and nothing else."""
    before = values(nnx.to_pure_dict(nnx.split(module)[1]))
    fn, params, state = lj.functional(module)
    x = jax.random.normal(jax.random.key(0), X.shape)
    kept = values(state)
    out, after = fn(params, state, x)
    again, _ = fn(params, state, x)
    later, _ = fn(params, after, x)
    np.testing.assert_array_equal(out, again)
    assert not np.array_equal(out, later)  # another dropout mask
    np.testing.assert_array_equal(kept["norm"]["mean"], state["norm"]["mean"])
    assert not np.array_equal(after["norm"]["mean"], state["norm"]["mean"])
    now = values(nnx.to_pure_dict(nnx.split(module)[1]))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, now))


def test_nnx_adapts(module):
    fn, params, state = lj.functional(module)
    config = lj.LoraConfig("all-linear", rank=2, init=False)
    plan = lj.plan(config, params, fn, (state, X))
    assert [s.path for s in plan] == [
        "blocks/0/kernel",
        "blocks/1/kernel",
        "out/kernel",
    ]
    adapter = lj.init(plan, params, key=jax.random.key(1))
    x = jax.random.normal(jax.random.key(0), X.shape)

    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        out, after = lj.adapt(fn)(bound, state, x)
        return (out**2).mean(), after

    (value, after), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        adapter.train
    )
    out, expected = fn(lj.merge(params, adapter), state, x)
    assert_close(value, (out**2).mean(), factor=16)
    assert_close(after["norm"], expected["norm"], factor=16)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))


def test_nnx_state_with_boxes_in_place(module):
    """`nnx.split`'s own states, variables and all: boxes are transparent."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def fn(params, rest, x):
        return nnx.merge(graphdef, params, rest)(x, deterministic=True)

    plan = lj.plan(
        lj.LoraConfig("all-linear", rank=2, init=False), params, fn, (rest, X)
    )
    adapter = lj.init(plan, params, key=jax.random.key(1))
    bound = lj.bind(params, adapter)
    got = jax.jit(lj.adapt(fn))(bound, rest, X)
    assert_close(got, jax.jit(fn)(lj.merge(params, adapter), rest, X), factor=8)


class Logical(nn.Module):
    """Kernels in boxes that name logical axes, and constraints on activations."""

    @nn.compact
    def __call__(self, x):
        for i, axes in enumerate([("embed", "mlp"), ("mlp", "embed")]):
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
            x = nn.Dense((8, 6)[i], kernel_init=init, name=f"w{i}")(jnp.tanh(x))
            x = nn.with_logical_constraint(x, ("batch", None, axes[1]))
        return x


@pytest.mark.parametrize("on_mesh", [False, True], ids=["anywhere", "on a mesh"])
def test_logically_partitioned(relaxed, on_mesh):
    model = Logical()
    variables = model.init(jax.random.key(0), X)
    kernel = variables["params"]["w0"]["kernel"]
    assert isinstance(kernel, nn.LogicallyPartitioned)
    if not on_mesh:
        plan = stand(model.apply, variables, X)
    else:
        rules = [("batch", "data"), ("embed", None), ("mlp", "model")]
        axes = jax.sharding.AxisType.Auto
        mesh = jax.make_mesh((2, 2), ("data", "model"), (axes, axes))
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            plan = stand(model.apply, variables, X)
    assert paths(plan) == ["params/w0/kernel", "params/w1/kernel"]


class TiedLinen(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(9, 6)
        return table.attend(nn.tanh(nn.Dense(6)(table(ids))))


def test_an_embedding_that_attends(relaxed):
    model, ids = TiedLinen(), jnp.arange(8).reshape(2, 4)
    variables = model.init(jax.random.key(0), ids)
    assert paths(stand(model.apply, variables, ids)) == ["params/Dense_0/kernel"]
    rules = {".*embedding": {"tie": "shared"}, "all-linear": {}}
    assert len(stand(model.apply, variables, ids, targets=rules)) == 2


def test_nnx_stands(module):
    """`functional`: dropout and batch statistics among what goes in and out."""
    fn, params, state = lj.functional(module)
    x = jax.random.normal(jax.random.key(0), X.shape)
    stand(lambda params, x: fn(params, state, x), params, x)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attend = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.up = nnx.LinearGeneral(6, (2, 4), rngs=rngs)
        self.down = nnx.LinearGeneral((2, 4), 6, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        x = x + self.attend(x)
        return x + self.down(nnx.gelu(self.up(x)))


class Scanned(nnx.Module):
    """A table, and blocks that `nnx.vmap` makes and `nnx.scan` runs."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(9, 6, rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Block(rngs)

        self.blocks = make(rngs)

    def __call__(self, ids):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return nnx.remat(type(block).__call__)(block, x)

        return self.embed.attend(run(self.embed(ids), self.blocks))


def test_nnx_scan(relaxed):
    fn, params, state = lj.functional(Scanned(nnx.Rngs(0)))
    ids = jnp.arange(8).reshape(2, 4)
    plan = stand(lambda params, ids: fn(params, state, ids)[0], params, ids)
    assert {slot.layers for slot in plan.slots} == {(3,)}
    assert len(plan) == 6 * 3 and "blocks/2/attend/query/kernel" in paths(plan)
