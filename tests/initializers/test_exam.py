"""Every registered initializer takes this exam; registering one enters it.

Those that read statistics are examined where their statistics are.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Counter, assert_close, draw

import lorax_jax as lj
from lorax_jax import initializers
from lorax_jax.initializers import Start

NAMES = [*initializers.names(), "pissa_niter_0", "pissa_niter_3"]
EXAMINED = [n for n in NAMES if initializers.method(n).reads != "stats"]
READERS = [n for n in EXAMINED if initializers.method(n).reads == "weight"]
every = pytest.mark.parametrize("name", EXAMINED, ids=str)
reader = pytest.mark.parametrize("name", READERS, ids=str)

RANK, SCALE = 4, 0.5


def test_every_family_is_examined():
    assert {initializers.get(name).func for name in NAMES[-2:]} == {
        initializers.pissa_niter
    }
    assert initializers.families() == ["pissa_niter_N"]


def start(name, weight, key, rank=RANK, scale=SCALE):
    return initializers.get(name)(weight, rank=rank, scale=scale, key=key)


def same_bits(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def product(found):
    return np.asarray(found.a, np.float64) @ np.asarray(found.b, np.float64)


def essence(name, a, b):
    """What rounding leaves alone: draws themselves, of decompositions the product.

    Singular vectors turn with the last digit of a weight; what they span does not.
    """
    return a @ b if name in READERS else (a, b)


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_factors(name, dtype, key):
    weight = draw(key, (12, 9), dtype)
    found = start(name, weight, key)
    assert isinstance(found, Start)
    assert found.a.shape == (12, RANK) and found.b.shape == (RANK, 9)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(found))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))
    assert found.a.any() or found.b.any()
    assert (found.a0 is None) == (found.b0 is None)
    if found.a0 is not None:
        same_bits((found.a0, found.b0), (found.a, found.b))
    elif name not in (False, "random"):  # which alone do not start at the base
        assert np.abs(product(found)).max() < 1e-6


@every
def test_one_key_one_start(name, key):
    weight = draw(key, (12, 9))
    expected = start(name, weight, key)
    same_bits(start(name, weight, key), expected)
    jitted = jax.jit(lambda w, k: start(name, w, k))(weight, key)
    found, wanted = (essence(name, x.a, x.b) for x in (jitted, expected))
    assert_close(found, wanted, length=12, factor=4)


@every
def test_mapped_over_layers_and_experts(name, key):
    weights, keys = draw(key, (2, 3, 12, 9)), jax.random.split(key, (2, 3))
    one = lambda w, k: start(name, w, k)  # noqa: E731
    many = jax.jit(jax.vmap(jax.vmap(one)))(weights, keys)
    for i, j in ((0, 0), (1, 2)):
        alone = one(weights[i, j], keys[i, j])
        found = essence(name, many.a[i, j], many.b[i, j])
        assert_close(found, essence(name, alone.a, alone.b), length=12, factor=4)


@every
def test_types_alone(name, key):
    weight = jax.ShapeDtypeStruct((12, 9), jnp.bfloat16)
    found = jax.eval_shape(lambda w, k: start(name, w, k), weight, key)
    assert (found.a.shape, found.b.shape) == ((12, RANK), (RANK, 9))
    assert found.a.dtype == found.b.dtype == jnp.float32


@every
def test_nothing_is_compiled_twice(name, key):
    begin = Counter(lambda w, k: start(name, w, k))
    jitted = jax.jit(begin)
    for seed in range(3):
        jitted(draw(jax.random.key(seed), (12, 9)), jax.random.key(seed))
    assert begin.calls == 1


@reader
def test_ranks_that_a_weight_cannot_have(name, key):
    with pytest.raises(ValueError, match=r"\(12, 9\), which (has|can have) 9"):
        start(name, draw(key, (12, 9)), key, rank=10)


def test_odd_ranks(key):
    with pytest.raises(ValueError, match="need an even rank, and 3 is odd"):
        start("orthogonal", draw(key, (12, 9)), key, rank=3)


# What holds of an adapter, whatever starts it.

PARAMS = {"w": (3, 12, 10), "u": (10, 8), "e": (20, 12)}


def scanned(params, ids):
    x = params["e"][ids]

    def layer(x, w):
        return x + jnp.tanh(jnp.pad(x @ w, ((0, 0), (0, 2)))), None

    return jax.lax.scan(layer, x, params["w"])[0][:, :10] @ params["u"]


IDS = jnp.arange(5)


def params_of(dtype="float32"):
    return {
        name: draw(jax.random.key(i), shape, dtype)
        for i, (name, shape) in enumerate(PARAMS.items())
    }


def planned(fn, params, name, **config):
    config = lj.LoraConfig(r".*", rank=RANK, alpha=2, init=name, **config)
    return lj.plan(config, params, fn, (IDS,))


@every
def test_a_stack_starts_as_its_layers(name, key):
    """An unrolled model has the paths that a stack's layers have, and so their keys."""
    params = params_of()
    apart = {"u": params["u"], "e": params["e"]}
    apart |= {str(i): {"w": params["w"][i]} for i in range(3)}

    def unrolled(params, ids):
        stack = jnp.stack([params[str(i)]["w"] for i in range(3)])
        return scanned(params | {"w": stack}, ids)

    one = lj.init(planned(scanned, params, name), params, key=key)
    many = lj.init(planned(unrolled, apart, name), apart, key=key)
    stack = {**one.fixed["w"], **one.train["w"]}
    for i in range(3):
        own = {**many.fixed[f"{i}/w"], **many.train[f"{i}/w"]}
        assert set(own) == set(stack)
        found = essence(name, stack["a"][i], stack["b"][i])
        assert_close(found, essence(name, own["a"], own["b"]), length=12, factor=4)


STARTS = [n for n in READERS if n != "mica"]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", READERS)
def test_the_first_step_is_the_base(name, dtype, dora, key):
    """Bit for bit, at every leaf the same object."""
    params = params_of(dtype)
    before = dict(params)
    config = lj.LoraConfig(
        {"e": {"dora": False}, ".*": {}}, rank=RANK, alpha=2, init=name, dora=dora
    )
    plan = lj.plan(config, params, scanned, (IDS,))
    adapter = lj.init(plan, params, key=key)
    run = jax.jit(
        lambda p, t: lj.adapt(scanned)(lj.bind(p, adapter._replace(train=t)), IDS)
    )
    expected = jax.jit(scanned)(params, IDS)
    np.testing.assert_array_equal(run(params, adapter.train), expected)
    assert all(params[name] is before[name] for name in params)
    # A step moves it.
    moved = jax.tree.map(lambda x: x * 1.5 + 0.1, adapter.train)
    assert (run(params, moved) != expected).any()


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05])
@pytest.mark.parametrize("name", STARTS)
def test_small_changes_survive_in_bfloat16(name, share, key):
    """The delta of factors that moved by a small share, in a model of 16 bits."""
    weight = draw(key, (96, 64), "bfloat16")
    x = jnp.eye(96, dtype=jnp.bfloat16)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    config = lj.LoraConfig("w", rank=8, alpha=4, init=name)
    plan = lj.plan(config, {"w": weight}, fn, (x,))
    adapter = lj.init(plan, {"w": weight}, key=key)
    keys = iter(jax.random.split(key, 2))
    train = {
        n: v + share * jnp.abs(v).mean() * jax.random.normal(next(keys), v.shape)
        for n, v in adapter.train["w"].items()
    }
    fixed = adapter.fixed["w"]
    bound = lj.bind({"w": jnp.zeros_like(weight)}, adapter._replace(train={"w": train}))
    found = np.asarray(lj.adapt(fn)(bound, x), np.float64)
    a, b, a0, b0 = (
        np.asarray(v, np.float64)
        for v in (train["a"], train["b"], fixed["a0"], fixed["b0"])
    )
    wanted = float(fixed["scale"]) * (a @ b - a0 @ b0)
    assert np.linalg.norm(found - wanted) < 0.01 * np.linalg.norm(wanted)


@every
def test_under_jit_and_on_types(name, key):
    params = params_of()
    plan = planned(scanned, params, name)
    adapter = lj.init(plan, params, key=key)
    jitted = jax.jit(lambda p, k: lj.init(plan, p, key=k))(params, key)
    types = jax.eval_shape(lambda p: lj.init(plan, p, key=key), params)
    assert jax.tree.structure(types) == jax.tree.structure(adapter)
    assert jax.tree.map(jnp.shape, types) == jax.tree.map(jnp.shape, adapter)
    for found in (adapter, jitted):
        for slot in plan.slots:
            assert {n: x.shape for n, x in found.train[slot.name].items()} == (
                slot.shapes()
            )
            # What is trained is donated: its start must be another array.
            for n, x in found.train[slot.name].items():
                start = found.fixed[slot.name].get(n + "0")
                if start is not None:
                    np.testing.assert_array_equal(start, x)
                    assert start.unsafe_buffer_pointer() != x.unsafe_buffer_pointer()


@every
def test_one_device_or_eight(name, key):
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    params = {"w": draw(key, (3, 16, 24)), "u": draw(key, (24, 8))}

    def fn(params, x):
        each = jax.lax.scan(lambda x, w: (x, x @ w), x, params["w"])[1]
        return each @ params["u"]

    config = lj.LoraConfig("(./w|u)", rank=RANK, init=name)
    plan = lj.plan(config, params, fn, (jnp.ones((2, 16)),))
    here = lj.init(plan, params, key=key)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharded = {
        "w": jax.device_put(params["w"], NamedSharding(mesh, P(None, "d", None))),
        "u": jax.device_put(params["u"], NamedSharding(mesh, P("d", None))),
    }
    there = jax.device_get(lj.init(plan, sharded, key=key))
    for slot in here.train:
        found, expected = ({**x.fixed[slot], **x.train[slot]} for x in (there, here))
        found, expected = (essence(name, x["a"], x["b"]) for x in (found, expected))
        if name in READERS or name == "orthogonal":
            assert_close(found, expected, factor=8)
        else:
            same_bits(found, expected)
