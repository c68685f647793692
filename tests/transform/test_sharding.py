"""Explicit sharding, automatic sharding and `shard_map`, on eight devices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, random_adapter
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax_jax as lj
from lorax_jax.adapters import Role

SPECS = {"emb": P(None, None), "up": P(None, "model"), "down": P("model", None)}


@pytest.fixture(scope="module")
def setting():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "emb": jax.random.normal(keys[0], (24, 16)) / 4,
        "up": jax.random.normal(keys[1], (16, 32)) / 4,
        "down": jax.random.normal(keys[2], (32, 16)) / 4,
    }
    ids = jax.random.randint(keys[3], (8, 6), 0, 24)
    config = lj.LoraConfig(["emb", "up", "down"], rank=2, init=False)
    plan = lj.plan(config, params, model, (ids,))
    return params, lj.init(plan, params, key=keys[0]), ids


def model(params, ids, inner=None, outer=None):
    h = params["emb"].at[ids].get(out_sharding=outer)
    h = jnp.einsum("bsd,df->bsf", h, params["up"], out_sharding=inner)
    return jnp.einsum("bsf,fd->bsd", jnp.tanh(h), params["down"], out_sharding=outer)


def value_and_grads(fn, params, adapter, ids):
    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return (lj.adapt(fn)(bound, ids) ** 2).mean()

    return jax.value_and_grad(loss)(adapter.train)


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4)])
def test_explicit_sharding(setting, shape):
    """Types keep their shardings, whichever axes are split."""
    params, adapter, ids = setting
    expected = jax.jit(value_and_grads, static_argnums=0)(model, *setting)
    types = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=types)
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(w, NamedSharding(mesh, SPECS[name]))
            for name, w in params.items()
        }
        ids = jax.device_put(ids, NamedSharding(mesh, P("data", None)))
        adapter = jax.device_put(adapter, NamedSharding(mesh, P()))

        def fn(params, ids):
            return model(params, ids, P("data", None, "model"), P("data", None, None))

        out = jax.jit(lj.adapt(fn))(lj.bind(placed, adapter), ids)
        assert jax.typeof(out).sharding.spec == P("data", None, None)
        got = jax.jit(value_and_grads, static_argnums=0)(fn, placed, adapter, ids)
        got = jax.device_get(got)
    assert_close(got, expected, factor=8)


def test_automatic_sharding(setting):
    """Under `jit` with sharded arguments, without a word about it anywhere."""
    params, adapter, ids = setting
    expected = jax.jit(value_and_grads, static_argnums=0)(model, *setting)
    types = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=types)
    placed = {
        name: jax.device_put(w, NamedSharding(mesh, SPECS[name]))
        for name, w in params.items()
    }
    ids = jax.device_put(ids, NamedSharding(mesh, P("data", None)))
    got = jax.jit(value_and_grads, static_argnums=0)(model, placed, adapter, ids)
    assert_close(jax.device_get(got), expected, factor=8)


def test_inside_shard_map(setting):
    """Data parallel by hand: the adapter's gradients are summed by the caller."""
    params, adapter, ids = setting
    _, expected = jax.jit(value_and_grads, static_argnums=0)(model, *setting)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def loss(train, fixed, params, ids):
        bound = lj.bind(params, lj.Adapter(train, fixed))
        return jax.lax.pmean((lj.adapt(model)(bound, ids) ** 2).mean(), "data")

    mapped = jax.shard_map(
        jax.grad(loss),
        mesh=mesh,
        in_specs=(P(), P(), P(), P("data")),
        out_specs=P(),
    )
    got = jax.jit(mapped)(adapter.train, adapter.fixed, params, ids)
    assert_close(jax.device_get(got), expected, factor=8)


def test_scan_inside_shard_map(key):
    params = {"w": jax.random.normal(key, (3, 16, 16)) / 4}
    x = jax.random.normal(key, (8, 16))

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    config = lj.LoraConfig("w", rank=2, init=False)
    adapter = lj.init(lj.plan(config, params, fn, (x,)), params, key=key)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        lambda params, adapter, x: lj.adapt(fn)(lj.bind(params, adapter), x),
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=P("data"),
    )
    got = jax.jit(mapped)(params, adapter, x)
    assert_close(jax.device_get(got), fn(lj.merge(params, adapter), x), factor=8)


IMAGE, KERNEL = P("data", None, None, None), P(None, None, None, "model")
ROLE = Role("w", (0, 1, 2), (3,))


@pytest.mark.parametrize(
    ("x_spec", "w_spec", "out_spec", "role"),
    [
        (IMAGE, P(), None, ROLE),
        (IMAGE, KERNEL, P("data", None, None, "model"), ROLE),
        (P("data", None, None, "model"), P(None, None, "model"), IMAGE, ROLE),
        (IMAGE, KERNEL, P("data", None, None, "model"), Role("w", (0, 1, 3), (2,))),
        (IMAGE, P(), P("data", None, None, "model"), replace(ROLE, groups=2)),
    ],
    ids=["data", "outputs", "inputs", "turned", "grouped"],
)
def test_convolutions_under_explicit_sharding(x_spec, w_spec, out_spec, role):
    """The thin convolution goes where `x` is, the result where the model wants it."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (8, 4, 4, 4))
    w = jax.random.normal(keys[1], (3, 3, 4 // role.groups, 6))
    adapter = random_adapter(keys[2], {"w": w}, [role])

    def fn(params, x, out=None):
        return jax.lax.conv_general_dilated(
            x,
            params["w"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=role.groups,
            out_sharding=out,
        )

    expected = fn(lj.merge({"w": w}, adapter), x)
    types = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, x_spec))
        params = {"w": jax.device_put(w, NamedSharding(mesh, w_spec))}
        adapter = jax.device_put(adapter, NamedSharding(mesh, P()))
        specs = [out_spec]
        if out_spec is not None:  # said in full, too
            specs.append(NamedSharding(mesh, out_spec))
        for spec in specs:
            run = lambda p, x, spec=spec: fn(p, x, spec)  # noqa: E731
            got = jax.jit(lj.adapt(run))(lj.bind(params, adapter), x)
            assert jax.typeof(got).sharding == jax.typeof(run(params, x)).sharding
            assert_close(jax.device_get(got), expected, length=36)
