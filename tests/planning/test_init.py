"""The starting adapter: the same whatever form the model has."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close

import lorax_jax as lj
from lorax_jax import initializers
from lorax_jax._errors import PlanError

LAYERS, D = 4, 8


def unrolled(params, x):
    for i in range(LAYERS):
        x = (
            jnp.tanh(x @ params["layers"][str(i)]["w"])
            + x @ params["layers"][str(i)]["v"]
        )
    return x


def scanned(params, x):
    return jax.lax.scan(
        lambda x, p: (jnp.tanh(x @ p["w"]) + x @ p["v"], None), x, params["layers"]
    )[0]


@pytest.fixture(scope="module")
def both():
    keys = jax.random.split(jax.random.key(1), 2 * LAYERS)
    layers = {
        str(i): {
            n: jax.random.normal(keys[2 * i + j], (D, D)) for j, n in enumerate("wv")
        }
        for i in range(LAYERS)
    }
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *layers.values())
    return {"layers": layers}, {"layers": stacked}


CONFIG = lj.LoraConfig(
    {
        r"layers/[12]/w": {"rank": 5, "init": "gaussian"},
        r"layers/[0-2]/.*": {"rank": 2, "alpha": 3},
    },
    init=False,
)


def start(fn, params, key=0):
    x = jnp.ones((3, D))
    plan = lj.plan(CONFIG, params, fn, (x,))
    return plan, lj.init(plan, params, key=jax.random.key(key))


def test_stacked_and_unrolled_start_alike(both):
    one, stacked = both
    plan, plain = start(unrolled, one)
    _, padded = start(scanned, stacked)
    for site in plan:
        name = site.path.split("/")[-1]
        i = int(site.path.split("/")[1])
        rows = padded.train[f"layers/{name}"]
        a, b = plain.train[site.path]["a"], plain.train[site.path]["b"]
        assert np.array_equal(rows["a"][i, :, : site.rank], a)
        assert np.array_equal(rows["b"][i, : site.rank], b)
        # Padding is zero on both sides, and so is a layer that is not adapted.
        assert not rows["a"][i, :, site.rank :].any()
        assert not rows["b"][i, site.rank :].any()
    assert list(padded.fixed["layers/w"]["rank"]) == [2, 5, 5, 0]
    assert not padded.train["layers/w"]["a"][3].any()
    assert padded.fixed["layers/w"]["scale"][3] == 0.0


def test_counts_use_true_ranks(both):
    counts = [
        lj.count(params, start(fn, params)[1])
        for params, fn in zip(both, (unrolled, scanned), strict=True)
    ]
    assert counts[0] == counts[1]
    assert counts[0].trainable == (2 + 5 + 5 + 3 * 2) * 2 * D


@pytest.mark.parametrize("tx", [optax.adamw(1e-2), optax.lion(1e-2), optax.sgd(1e-3)])
def test_padding_never_moves(both, relaxed, tx):
    _, params = both
    _, adapter = start(scanned, params)
    x = jax.random.normal(jax.random.key(3), (5, D))

    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return (lj.adapt(scanned)(bound, x) ** 2).mean()

    train, state = adapter.train, tx.init(adapter.train)
    step = jax.jit(lambda t, s: tx.update(jax.grad(loss)(t), s, t))
    for _ in range(3):
        updates, state = step(train, state)
        train = optax.apply_updates(train, updates)
    w = train["layers/w"]
    assert not w["a"][0, :, 2:].any() and not w["b"][0, 2:].any()
    assert not w["a"][3].any() and not w["b"][3].any()
    assert (w["a"][1] != adapter.train["layers/w"]["a"][1]).all()


def test_the_same_adapter_for_the_same_key_and_another_for_another(both):
    params, _ = both
    (_, one), (_, two), (_, other) = (start(unrolled, params, key) for key in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, one.train, two.train))
    assert not np.array_equal(
        one.train["layers/0/w"]["a"], other.train["layers/0/w"]["a"]
    )


def test_a_site_starts_the_same_in_any_company(both):
    params, _ = both
    x = jnp.ones((3, D))
    alone = lj.plan(lj.LoraConfig("layers/2/w", init=False), params, unrolled, (x,))
    many = lj.plan(lj.LoraConfig("layers/.*", init=False), params, unrolled, (x,))
    key = jax.random.key(0)
    one, two = (
        lj.init(plan, params, key=key).train["layers/2/w"] for plan in (alone, many)
    )
    assert np.array_equal(one["a"], two["a"])


def test_same_bits_on_eight_devices(both):
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    _, params = both
    plan, _ = start(scanned, params)
    here = jax.jit(lambda params: lj.init(plan, params, key=jax.random.key(0)))(params)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    there = jax.jit(
        lambda params: lj.init(plan, params, key=jax.random.key(0)),
        out_shardings=NamedSharding(mesh, P()),
    )(jax.device_put(params, NamedSharding(mesh, P(None, None, "d"))))
    assert jax.tree.all(jax.tree.map(np.array_equal, here, jax.device_get(there)))


def test_init_runs_on_types_alone(both):
    _, params = both
    plan, adapter = start(scanned, params)
    types = jax.eval_shape(lambda p: lj.init(plan, p, key=jax.random.key(0)), params)
    assert jax.tree.map(jnp.shape, types) == jax.tree.map(jnp.shape, adapter)


def test_other_parameters_are_refused(both):
    one, stacked = both
    plan, _ = start(unrolled, one)
    with pytest.raises(PlanError, match="`params` has no such leaf"):
        lj.init(plan, stacked, key=jax.random.key(0))


def test_storage_dtype(both):
    params, _ = both
    config = lj.LoraConfig("layers/0/w", dtype=jnp.bfloat16)
    plan = lj.plan(config, params, unrolled, (jnp.ones((3, D)),))
    train = lj.init(plan, params, key=jax.random.key(0)).train["layers/0/w"]
    assert train["a"].dtype == train["b"].dtype == jnp.bfloat16


def test_experts_draw_one_by_one(key):
    params = {"w": jnp.ones((3, D, D))}
    fn = lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"])  # noqa: E731
    plan = lj.plan(lj.LoraConfig("w", rank=2), params, fn, (jnp.ones((3, 2, D)),))
    a = lj.init(plan, params, key=key).train["w"]["a"]
    assert a.shape == (3, D, 2) and not np.array_equal(a[0], a[1])
    # The bound is of one expert's inputs, not of all of them.
    assert 0.9 / np.sqrt(D) < np.abs(a).max() <= 1 / np.sqrt(D)


def test_distributions(key):
    """Bounds and deviations are PEFT's."""
    weight = jax.ShapeDtypeStruct((400, 300), jnp.float32)
    kaiming = initializers.kaiming(weight, rank=64, scale=1.0, key=key).a
    assert 0.99 / 20 < np.abs(kaiming).max() <= 1 / 20
    assert_close(kaiming.std(), 1 / 20 / np.sqrt(3), factor=1e4)
    gaussian = initializers.gaussian(weight, rank=64, scale=1.0, key=key).a
    assert abs(float(gaussian.std()) * 64 - 1) < 0.01
    both = initializers.random(weight, rank=64, scale=1.0, key=key)
    assert 0.99 / 8 < np.abs(both.b).max() <= 1 / 8
    table = initializers.embedding(weight, rank=64, scale=1.0, key=key)
    assert not table.a.any() and abs(float(table.b.std()) - 1) < 0.02
