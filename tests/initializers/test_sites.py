"""Initializers at sites of every sort: what they are given, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bases import ToyInt8
from helpers import Counter, assert_close, draw

import lorax_jax as lj
from lorax_jax import initializers
from lorax_jax._errors import PlanError
from lorax_jax.initializers import Start
from lorax_jax.planning._resize import resized

ROLES = {"w": {"inputs": (1,), "outputs": (2,), "batch": (0,)}}


def stack(key, shape=(3, 12, 9)):
    """Layers of a scan, and the model."""

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (x, x @ w), x, params["w"])[1]

    return {"w": draw(key, shape)}, fn, jnp.ones((2, shape[1]))


def planned(key, rules, **config):
    params, fn, x = stack(key)
    return params, lj.plan(lj.LoraConfig(rules, **config), params, fn, (x,))


def test_ranks_and_methods_that_differ_by_layer(key):
    """Each layer as it would start alone; those without starting factors have zeros."""
    rules = {
        "0/w": {"rank": 2, "init": "pissa"},
        "1/w": {"rank": 4, "init": True},
        "2/w": {"rank": 3, "init": "olora"},
    }
    params, plan = planned(key, rules, alpha=6)
    adapter = lj.init(plan, params, key=key)
    train, fixed = adapter.train["w"], adapter.fixed["w"]
    begin = {0: initializers.pissa, 2: initializers.olora}
    for i, rank in enumerate((2, 4, 3)):
        a, b = train["a"][i], train["b"][i]
        assert not a[:, rank:].any() and not b[rank:].any()
        if i == 1:
            assert not fixed["a0"][1].any() and not fixed["b0"][1].any() and a.any()
            continue
        np.testing.assert_array_equal(fixed["a0"][i], a)
        alone = begin[i](params["w"][i], rank=rank, scale=6 / rank, key=key)
        assert_close(a @ b, alone.a @ alone.b, length=12, factor=4)


def test_experts_each_have_their_own(key):
    params = {"w": draw(key, (3, 12, 9))}
    plan = lj.plan(lj.LoraConfig("w", rank=2, init="pissa"), params, roles=ROLES)
    found = lj.init(plan, params, key=key).train["w"]
    for i in range(3):
        u, s, vt = np.linalg.svd(params["w"][i])
        assert_close(found["a"][i] @ found["b"][i], u[:, :2] * s[:2] @ vt[:2], factor=4)


def test_packed_bases_start_at_what_they_unpack_to(key):
    params, fn, x = stack(key)
    packed = {"w": ToyInt8.quantize(params["w"])}
    config = lj.LoraConfig("./w", rank=2, init="pissa")
    one, two = (
        lj.init(lj.plan(config, p, fn, (x,)), p, key=key).train["w"]
        for p in (packed, {"w": packed["w"].dense()})
    )
    assert_close(one["a"] @ one["b"], two["a"] @ two["b"], length=12, factor=4)


def test_a_table_starts_at_its_own_directions(key):
    """PEFT falls back to its default there, in silence."""
    params = {"e": draw(key, (20, 6))}
    fn = lambda p, ids: p["e"][ids]  # noqa: E731
    config = lj.LoraConfig("e", rank=2, alpha=2, init="pissa")
    adapter = lj.init(lj.plan(config, params, fn, (jnp.arange(3),)), params, key=key)
    u, s, vt = np.linalg.svd(params["e"], full_matrices=False)
    found = adapter.train["e"]
    assert_close(found["a"] @ found["b"], u[:, :2] * s[:2] @ vt[:2], factor=4)


def test_one_program_for_all_leaves_of_a_shape(key, monkeypatch):
    method = initializers.method("pissa")
    counted = Counter(method.start)
    known = initializers._base._REGISTRY
    monkeypatch.setitem(known, "pissa", dataclasses.replace(method, start=counted))
    params = {f"w{i}": draw(key, (11, 7)) for i in range(4)}
    roles = {name: {"inputs": (0,), "outputs": (1,)} for name in params}
    plan = lj.plan(lj.LoraConfig("w.", rank=2, init="pissa"), params, roles=roles)
    lj.init(plan, params, key=key)
    lj.init(plan, params, key=jax.random.key(1))
    assert counted.calls == 1


@pytest.mark.parametrize("dora", [False, True])
def test_a_frozen_factor_is_no_parameter(key, dora):
    params, plan = planned(key, "./w", rank=4, init="mica", dora=dora)
    (slot,) = plan.slots
    assert slot.frozen == ("b",) and "b" not in slot.shapes()
    adapter = lj.init(plan, params, key=key)
    assert set(adapter.train["w"]) == {"a"} | ({"magnitude"} if dora else set())
    held = sum(x.size for x in jax.tree.leaves(adapter.train))
    assert plan.trainable == lj.count(params, adapter).trainable == held
    smaller = resized(plan, {"0/w": (2, 4.0)})
    assert plan.trainable - smaller.trainable == 2 * 12


@pytest.mark.parametrize("name", ["pissa", "mica"])
def test_an_audit_finds_nothing(key, name):
    params, fn, x = stack(key)
    plan = lj.plan(lj.LoraConfig("./w", rank=2, init=name), params, fn, (x,))
    adapter = lj.init(plan, params, key=key)
    lj.audit(fn, params, adapter, x).raise_if_failed()


# What is refused.


def test_layers_that_freeze_and_layers_that_do_not(key):
    rules = {"0/w": {"init": "mica"}, "./w": {"init": True}}
    match = r"`init` = 'mica' at '0/w' freezes \['b'\], `init` = True at '1/w' \[\]"
    with pytest.raises(PlanError, match=match):
        planned(key, rules, rank=2)


def test_odd_ranks(key):
    match = "'orthogonal' needs ranks that are multiples of 2, and '0/w' has the rank 3"
    with pytest.raises(PlanError, match=match):
        planned(key, "./w", rank=3, init="orthogonal")


@pytest.mark.parametrize("alpha", [0, -1.5])
def test_scales_that_cannot_be_shared_out(key, alpha):
    with pytest.raises(PlanError, match=f"`alpha` = {alpha} at '0/w', whose `init`"):
        planned(key, "./w", rank=2, alpha=alpha, init="pissa")
    planned(key, "./w", rank=2, alpha=alpha)


def test_ranks_that_the_weight_cannot_have(key):
    with pytest.raises(PlanError, match="`rank` = 10 exceeds 9"):
        planned(key, "./w", rank=10, init="pissa")


def test_types_have_no_values(key):
    params, plan = planned(key, "./w", rank=2, init="pissa")
    types = jax.eval_shape(lambda p: p, params)
    with pytest.raises(PlanError, match="'w' is known by its type alone"):
        lj.init(plan, types, key=key)


@pytest.fixture
def means(monkeypatch):
    """An initializer that reads the mean of what reaches a weight."""
    from lorax_jax.initializers import _base

    monkeypatch.setattr(_base, "_REGISTRY", dict(_base._REGISTRY))

    @initializers.register("means", reads="stats")
    def means(weight, *, rank, scale, key, stats=None):
        if stats.shape != weight.shape[:1]:
            raise ValueError(f"A mean of shape {stats.shape} is no mean of its inputs.")
        a = jnp.tile(stats[:, None], (1, rank))
        return Start(a, jnp.zeros((rank, weight.shape[1])))


def test_statistics_reach_their_layers(means, key):
    rules = {"1/w": {"init": True}, "./w": {}}
    params, plan = planned(key, rules, rank=2, init="means")
    stats = draw(key, (3, 12))
    a = lj.init(plan, params, key=key, stats={"w": stats}).train["w"]["a"]
    for i in (0, 2):
        np.testing.assert_array_equal(a[i], jnp.tile(stats[i][:, None], (1, 2)))
    assert not np.array_equal(a[1, :, 0], a[1, :, 1])


@pytest.mark.parametrize(
    ("stats", "match"),
    [
        (None, "`init` = 'means' at 'w' reads statistics, and `stats` has none"),
        ({}, "`init` = 'means' at 'w' reads statistics, and `stats` has none"),
        ({"v": np.ones((3, 12))}, "`stats` holds 'v' and nothing that .* Closest: w"),
        (
            {"w": np.ones((2, 12))},
            r"shape \(2, 12\), whose leading axes must be \(3,\)",
        ),
        ({"w": np.ones((3, 5))}, r"'w' cannot be started: A mean of shape \(5,\)"),
    ],
)
def test_statistics_of_something_else(means, key, stats, match):
    params, plan = planned(key, "./w", rank=2, init="means")
    with pytest.raises(PlanError, match=match):
        lj.init(plan, params, key=key, stats=stats)


def test_decompositions_of_weights_laid_out_by_explicit_axes(key):
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    params, fn, x = stack(key, (3, 16, 24))
    for name in ("pissa", "pissa_niter_1", "olora", "mica"):
        config = lj.LoraConfig("./w", rank=2, init=name)
        plan = lj.plan(config, params, fn, (x,))
        here = lj.init(plan, params, key=key)
        with jax.set_mesh(mesh):
            for spec in (P(None, "d", None), P(None, None, "d")):
                sharded = jax.device_put(params["w"], NamedSharding(mesh, spec))
                there = lj.init(plan, {"w": sharded}, key=key)
                both = []
                for one in (here, jax.device_get(there)):
                    held = {**one.fixed["w"], **one.train["w"]}
                    both.append(np.asarray(held["a"]) @ np.asarray(held["b"]))
                assert_close(*both, length=24, factor=4)
