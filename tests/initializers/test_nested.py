"""Methods whose factors of one rank are the first ones of a larger rank's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_jax as lj
from lorax_jax import initializers
from lorax_jax._errors import PlanError
from lorax_jax._linalg import TOLERANCE
from lorax_jax.initializers import Start, _base
from lorax_jax.planning import _draw
from lorax_jax.statistics import Moments, Pca

NESTED = [name for name in initializers.names() if initializers.method(name).nested]
D_IN, D_OUT = 40, 24


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def moments(rows):
    stat = Moments()
    state = stat.init(rows.shape[-1])
    return stat.update(state, stat.observe(rows, None, stat.context(state)))


def test_which_are():
    assert set(NESTED) == {"pissa", "olora", "eva"}


@pytest.mark.parametrize("name", NESTED)
def test_a_larger_rank_begins_with_a_smaller_ones_factors(name, key):
    # Of values that lie apart, so that each direction is determined.
    size = jnp.asarray(0.8 ** np.arange(D_IN), jnp.float32)
    weight = drawn(D_IN, D_OUT) * size[:, None]
    stats = moments(drawn(300, D_IN, seed=1) * size[None])
    method = initializers.method(name)

    def of(rank):
        return method.start(weight, rank=rank, scale=2.0, key=key, stats=stats)

    few, many = of(3), of(9)
    # Directions are known to the residual of the Gram matrix over the gap between two
    # of its values, a tenth of the largest at least.
    near = 10 * TOLERANCE * float(jnp.abs(few.a).max())
    np.testing.assert_allclose(few.a, many.a[:, :3], rtol=0, atol=near)
    np.testing.assert_allclose(few.b, many.b[:3], rtol=0, atol=near)


@pytest.fixture
def traced(monkeypatch):
    """A method that keeps the ranks it was traced at; `False` for one not nested."""

    def register(nested):
        ranks = []

        def begin(weight, *, rank, scale, key, stats=None):
            ranks.append(rank)
            a = weight[:, :rank] * scale
            b = jnp.ones((rank, weight.shape[1]))
            return Start(a, b, a, b)

        method = initializers.Method(begin, reads="weight", nested=nested)
        monkeypatch.setitem(_base._REGISTRY, "first columns", method)
        return ranks

    return register


@pytest.mark.parametrize("nested", [True, False])
def test_one_program_starts_all_ranks_of_a_shape(nested, traced, key):
    """Weights of their own, layers of a stack, ranks and scales that all differ."""
    ranks = traced(nested)
    params = {n: drawn(D_IN, D_OUT, seed=i) for i, n in enumerate("uvw")}
    params["stack"] = drawn(3, D_IN, D_OUT, seed=3)
    said = {"u": 2, "v": 3, "w": 5, "0/stack": 4, "1/stack": 5, "2/stack": 1}
    alphas = {name: 2 * i + 1 for i, name in enumerate(said)}
    rules = {n: {"rank": r, "alpha": alphas[n]} for n, r in said.items()}

    def fn(params, x):
        both = [x @ params[n] for n in "uvw"]
        return both, jax.lax.scan(lambda x, w: (x, x @ w), x, params["stack"])[1]

    config = lj.LoraConfig(rules, init="first columns")
    adapter = lj.init(lj.plan(config, params, fn, (drawn(2, D_IN),)), params, key=key)
    # The stack has an axis more, and so a program of its own.
    assert ranks == [5, 5] if nested else sorted(ranks) == [1, 2, 3, 4, 5, 5]
    for name, rank in said.items():
        scale = jnp.float32(alphas[name] / rank)
        *layer, path = name.split("/")
        at = tuple(map(int, layer))
        train = adapter.train[path]
        a, b, weight = train["a"][at], train["b"][at], params[path][at]
        np.testing.assert_array_equal(a[:, :rank], weight[:, :rank] * scale)
        np.testing.assert_array_equal(b[:rank], np.ones((rank, D_OUT)))
        assert not a[:, rank:].any() and not b[rank:].any()
        assert a.shape == (D_IN, 5 if at else rank)


def test_ranks_of_another_magnitude_start_on_their_own(traced, key):
    """Else one site of rank 64 would make all others cost as much."""
    ranks = traced(True)
    said = {"u": 2, "v": 7, "w": 16}
    params = {n: drawn(D_IN, D_OUT, seed=i) for i, n in enumerate(said)}
    roles = {n: {"inputs": (0,), "outputs": (1,)} for n in params}
    rules = {n: {"rank": r, "init": "first columns"} for n, r in said.items()}
    lj.init(lj.plan(lj.LoraConfig(rules), params, roles=roles), params, key=key)
    assert ranks == [7, 16]


def test_a_rank_that_another_site_cannot_have_names_that_site(key):
    params = {n: drawn(D_IN, D_OUT, seed=i) for i, n in enumerate("uv")}
    roles = {n: {"inputs": (0,), "outputs": (1,)} for n in params}
    rules = {"u": {"rank": 2}, "v": {"rank": 7}}
    plan = lj.plan(lj.LoraConfig(rules, init="eva"), params, roles=roles)
    stat = Pca(4)
    state = stat.init(D_IN)
    rows = drawn(300, D_IN, seed=5)
    state = stat.update(state, stat.observe(rows, None, stat.context(state)))
    with pytest.raises(PlanError, match="'v' cannot be started: 7 principal"):
        lj.init(plan, params, key=key, stats={"u": state, "v": state})


def test_equal_options_are_one_program(key):
    params = {n: drawn(D_IN, D_OUT, seed=i) for i, n in enumerate("uvw")}
    roles = {n: {"inputs": (0,), "outputs": (1,)} for n in params}
    state = moments(drawn(300, D_IN, seed=5))
    stats = dict.fromkeys(params, state)
    before = _draw._read._cache_size()
    for _ in range(2):
        config = lj.LoraConfig(".", rank=3, init=initializers.Eva(whiten=True))
        plan = lj.plan(config, params, roles=roles)
        lj.init(plan, params, key=key, stats=stats)
    assert _draw._read._cache_size() - before <= 1


def test_an_initializer_that_asks_for_values(monkeypatch, key):
    def begin(weight, *, rank, scale, key, stats=None):
        a = weight[:, :rank] * math.sqrt(scale)
        return Start(a, jnp.zeros((rank, weight.shape[1])))

    method = initializers.Method(begin, reads="weight")
    monkeypatch.setitem(_base._REGISTRY, "careless", method)
    params, roles = {"w": drawn(D_IN, D_OUT)}, {"w": {"inputs": (0,), "outputs": (1,)}}
    plan = lj.plan(lj.LoraConfig("w", init="careless"), params, roles=roles)
    with pytest.raises(PlanError, match="of 'w' asks for the value .* `jnp.sqrt`"):
        lj.init(plan, params, key=key)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_2"])
def test_weights_without_directions_are_refused(name, key):
    params, roles = {"w": jnp.zeros((60, 60))}, {"w": {"inputs": (0,), "outputs": (1,)}}
    plan = lj.plan(lj.LoraConfig("w", rank=4, init=name), params, roles=roles)
    match = "weight at 'w' has fewer directions than its rank 4, .* 'kaiming'"
    with pytest.raises(PlanError, match=match):
        lj.init(plan, params, key=key)
