"""Explicit sharding, automatic sharding and `shard_map`, on eight devices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, random_adapter
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax_jax as lj
from lorax_jax._errors import TransformError
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


# A model that is mapped over devices inside: where the weight is split, and what the
# model does to complete its product.
MAPPED = {
    "in": (P("d"), P(None, "d"), P(), lambda y: jax.lax.psum(y, "d")),
    "out": (P(None, "d"), P(), P(None, "d"), lambda y: y),
    "replicated": (P(), P("d"), P("d"), lambda y: y),
    "both": (
        P("e", "d"),
        P(None, "e"),
        P(None, "d"),
        lambda y: jax.lax.psum(y, "e"),
    ),
}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("where", MAPPED)
def test_shard_map_inside_the_model(key, where, check_vma):
    w_spec, x_spec, y_spec, complete = MAPPED[where]
    shape, names = ((8,), ("d",)) if where != "both" else ((2, 4), ("e", "d"))
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))

    def fn(params, x):
        mapped = jax.shard_map(
            lambda w, x: jnp.tanh(complete(x @ w)),
            mesh=mesh,
            in_specs=(w_spec, x_spec),
            out_specs=y_spec,
            check_vma=check_vma,
        )
        return mapped(params["w"], x)

    params = {"w": jax.random.normal(key, (16, 24)) / 4}
    x = jax.random.normal(key, (8, 16))
    config = lj.LoraConfig("w", rank=2, init=False)
    adapter = lj.init(lj.plan(config, params, fn, (x,)), params, key=key)

    def loss(train, dense=False):
        adapter_ = lj.Adapter(train, adapter.fixed)
        if dense:
            return (fn(lj.merge(params, adapter_), x) ** 2).mean()
        return (lj.adapt(fn)(lj.bind(params, adapter_), x) ** 2).mean()

    expected = jax.jit(jax.value_and_grad(lambda t: loss(t, dense=True)))(adapter.train)
    got = jax.jit(jax.value_and_grad(loss))(adapter.train)
    assert_close(jax.device_get(got), jax.device_get(expected), factor=8)
    assert_close(loss(adapter.train), expected[0], factor=8)


def test_experts_split_over_devices_inside_the_model(key):
    """A batch axis is split in both factors; a stack's scales are split with it."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def fn(params, x):
        def local(w, x):
            return jax.lax.scan(lambda c, wx: (c, wx[1] @ wx[0]), 0.0, (w, x))[1]

        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P("d"), P("d")),
            out_specs=P("d"),
            check_vma=False,
        )
        return mapped(params["w"], x)

    params = {"w": jax.random.normal(key, (16, 6, 4))}
    x = jax.random.normal(key, (16, 3, 6))
    plan = lj.plan(lj.LoraConfig("w", rank=2, init=False), params, fn, (x,))
    assert plan.slots[0].role.stack == 1
    adapter = lj.init(plan, params, key=key)
    got = jax.jit(lj.adapt(fn))(lj.bind(params, adapter), x)
    expected = fn(lj.merge(params, adapter), x)
    assert_close(jax.device_get(got), jax.device_get(expected), factor=8)


def test_a_mapped_function_that_hands_back_a_weight_is_refused(key):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def fn(params, x):
        double = jax.shard_map(
            lambda w: 2.0 * w, mesh=mesh, in_specs=P("d"), out_specs=P("d")
        )
        return x @ double(params["w"])

    params = {"w": jnp.ones((8, 4))}
    x = jnp.ones((2, 8))
    config = lj.LoraConfig("w", rank=2)
    plan = lj.plan(config, params, fn, (x,), materialize="shard_map")
    bound = lj.bind(params, lj.init(plan, params, key=key))
    with pytest.raises(TransformError, match="mapped function hands back an adapted"):
        lj.adapt(fn)(bound, x)


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
