"""The protocol that every initializer follows, and the names that they go by."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

import lorax_jax as lj
from lorax_jax import initializers
from lorax_jax._errors import PlanError
from lorax_jax.initializers import Method, Start, embedding, gaussian, kaiming, random

METHODS = [
    kaiming,
    gaussian,
    random,
    embedding,
    functools.partial(embedding, zero=False),
]
IDS = ["kaiming", "gaussian", "random", "embedding", "embedding_random"]
WEIGHT = jax.ShapeDtypeStruct((12, 6), jnp.float32)
every = pytest.mark.parametrize("method", METHODS, ids=IDS)


def start(method, key, weight: Any = WEIGHT, rank=3, scale=2.0):
    return method(weight, rank=rank, scale=scale, key=key)


def assert_same_bits(found, expected):
    assert isinstance(found, Start)
    assert found.a0 is found.b0 is expected.a0 is expected.b0 is None
    for x, y in zip(found[:2], expected[:2], strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@every
def test_a_key_decides_every_bit(method, key):
    expected = start(method, key)
    assert_same_bits(start(method, key), expected)
    # A compiler may fold two constants into one: an ulp, but the same draws.
    jitted = jax.jit(lambda key: start(method, key))
    assert_close(jitted(key), expected, length=1)
    assert_same_bits(jitted(key), jitted(key))
    for seed in range(1, 4):
        other = start(method, jax.random.key(seed))
        for x, y in zip(other[:2], expected[:2], strict=True):
            assert (x != y).all() or not (x.any() or y.any())


@every
def test_neither_the_weight_nor_the_scale_counts(method, key):
    """Types are enough, and factors are float32 whatever the weight is."""
    expected = start(method, key)
    weight = jnp.full((12, 6), jnp.nan, jnp.bfloat16)
    assert_same_bits(start(method, key, weight=weight), expected)
    assert_same_bits(start(method, key, scale=0.25), expected)


@every
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_types_without_values(method, rank):
    """Under `eval_shape`, with any rank: more than the weight has, too."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    a, b, *_ = jax.eval_shape(lambda key: start(method, key, rank=rank), key)
    assert (a.shape, b.shape) == ((12, rank), (rank, 6))
    assert a.dtype == b.dtype == jnp.float32


@every
def test_options_go_by_name(method, key):
    with pytest.raises(TypeError, match="missing (a|1) required .*argument: 'key'"):
        method(WEIGHT, rank=3, scale=2.0)
    with pytest.raises(TypeError, match="missing (a|1) required .*argument: 'rank'"):
        method(WEIGHT, scale=2.0, key=key)
    with pytest.raises(TypeError, match="positional argument"):
        method(WEIGHT, 3, 2.0, key)
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpha'"):
        method(WEIGHT, rank=3, scale=2.0, key=key, alpha=1.0)


def test_names():
    assert {True, "kaiming", "gaussian", False, "random"} <= set(initializers.names())
    assert initializers.get(True) is initializers.get("kaiming") is kaiming
    assert initializers.get(False) is initializers.get("random") is random
    assert initializers.get("gaussian") is gaussian


@pytest.mark.parametrize("unknown", ["pizza", "Kaiming", None, 2])
def test_unknown_names(unknown):
    with pytest.raises(KeyError, match=repr(unknown)):
        initializers.get(unknown)


@pytest.mark.parametrize("unknown", ["pizza", "Kaiming", 2])
def test_unknown_names_in_a_rule(unknown):
    """Not only in the configuration's own `init`."""
    config = lj.LoraConfig({"w": {"init": unknown}})
    roles = {"w": {"inputs": (0,), "outputs": (1,)}}
    with pytest.raises(PlanError) as error:
        lj.plan(config, {"w": WEIGHT}, roles=roles)
    known = [*initializers.names(), *initializers.families()]
    assert str(error.value) == (
        f"`init` = {unknown!r} is no initializer. Known: {', '.join(map(repr, known))}."
    )


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry, for the test alone."""
    from lorax_jax.initializers import _base

    monkeypatch.setattr(_base, "_REGISTRY", dict(_base._REGISTRY))
    monkeypatch.setattr(_base, "_FAMILIES", dict(_base._FAMILIES))


def test_a_method_of_ones_own(registry, key):
    @initializers.register("ones", "eins")
    def ones(weight, *, rank, scale, key, stats=None):
        """A one, B the scale."""
        d_in, d_out = weight.shape
        return Start(jnp.ones((d_in, rank)), jnp.full((rank, d_out), scale))

    assert initializers.get("ones") is initializers.get("eins") is ones
    assert {"ones", "eins"} < set(initializers.names())
    config = lj.LoraConfig("w", rank=2, alpha=6, init="ones")
    plan = lj.plan(
        config, {"w": WEIGHT}, roles={"w": {"inputs": (0,), "outputs": (1,)}}
    )
    (factors,) = lj.init(plan, {"w": WEIGHT}, key=key).train.values()
    np.testing.assert_array_equal(factors["a"], np.ones((12, 2)))
    np.testing.assert_array_equal(factors["b"], np.full((2, 6), 3.0))


def test_the_copy_of_the_registry_is_gone():
    assert "ones" not in initializers.names()
    assert "count_N" not in initializers.families()


def test_what_a_method_says_of_itself(registry):
    @initializers.register("ones", reads="weight", freezes=("b",))
    def ones(weight, *, rank, scale, key, stats=None): ...

    assert initializers.method("ones") == Method(ones, "weight", ("b",))
    assert initializers.method(True).reads == "shape"
    assert initializers.method(True).lookup is embedding


def test_a_name_with_a_number(registry):
    @initializers.family("count_N", reads="weight")
    def count(weight, *, rank, scale, key, stats=None, n):
        return n

    assert initializers.families()[-1] == "count_N"
    assert initializers.get("count_12")(WEIGHT, rank=1, scale=1.0, key=None) == 12
    assert initializers.get("count_12") is initializers.get("count_12")
    assert initializers.method("count_0").reads == "weight"
    for unknown in (
        "count_",
        "count_N",
        "count_-1",
        "count_1.5",
        "count_1x",
        "Count_1",
    ):
        with pytest.raises(KeyError, match=unknown):
            initializers.get(unknown)


@pytest.mark.parametrize(
    "init, zero",
    [(True, True), ("kaiming", True), ("gaussian", True)]
    + [(False, False), ("random", False), (0, False), (np.False_, False)],
)
def test_tables_start_as_embeddings_under_every_name(init, zero, key):
    params = {"table": jax.ShapeDtypeStruct((9, 4), jnp.float32)}
    roles = {"table": {"inputs": (0,), "outputs": (1,), "lookup": True}}
    plan = lj.plan(lj.LoraConfig("table", rank=2, init=init), params, roles=roles)
    (factors,) = lj.init(plan, params, key=key).train.values()
    assert factors["a"].any() == (not zero)
    assert factors["b"].all()
