"""Methods whose factors of one rank are the first ones of a larger rank's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_jax as lj
from lorax_jax import initializers
from lorax_jax._linalg import TOLERANCE
from lorax_jax.initializers import Start, _base
from lorax_jax.statistics import Moments

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
