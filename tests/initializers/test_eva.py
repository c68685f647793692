"""EVA: orthonormal columns along which inputs vary, and B zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from streams import D, gathered, rows

import lorax_jax as lj
from lorax_jax import initializers
from lorax_jax.errors import CaptureError
from lorax_jax.initializers import Eva, eva
from lorax_jax.statistics import Moments, Pca, SecondMoment, Sketch

WEIGHT = jax.ShapeDtypeStruct((D, 7), jnp.float32)
BATCHES = [rows(40), rows(30, seed=1)]


def start(state, rank=3, weight=WEIGHT, **options):
    method = initializers.get(Eva(**options))
    return method(weight, rank=rank, scale=2.0, key=jax.random.key(0), stats=state)


@pytest.mark.parametrize("stat", [Moments(), Pca(3), Sketch(3)])
def test_columns_are_the_principal_directions(stat):
    state = gathered(stat, BATCHES)
    found = start(state)
    assert found.a.dtype == found.b.dtype == jnp.float32
    assert found.a0 is None and found.b0 is None
    assert found.b.shape == (3, 7) and not found.b.any()
    assert_close(found.a.T @ found.a, np.eye(3), factor=4)
    np.testing.assert_array_equal(found.a, state.principal(3).vectors)
    x = np.concatenate(BATCHES).astype(np.float64)
    first = np.linalg.svd(x - x.mean(0))[2][0]
    assert abs(abs(found.a[:, 0] @ first) - 1) < 1e-4


def test_whitened_columns_are_divided_once():
    """By the root of the singular value of the centred rows."""
    state = gathered(Moments(), BATCHES)
    x = np.concatenate(BATCHES).astype(np.float64)
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False)[:3]
    expected = np.asarray(start(state).a, np.float64) / np.sqrt(singular)
    # Singular values are roots of sums that lose the square of mean / deviation.
    assert_close(start(state, whiten=True).a, expected, factor=16)


def test_layers_and_types():
    states = jax.vmap(lambda x: gathered(Moments(), [x]))(jnp.stack([rows(9), rows(9)]))

    def both(states):
        return jax.vmap(start)(states)

    kinds = jax.eval_shape(both, states)
    found = jax.jit(both)(states)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(lambda x: x.shape, kinds)
    one = start(jax.tree.map(lambda x: x[1], states))
    assert_close(jax.tree.map(lambda x: x[1], found), one, factor=256)


def test_registered():
    method = initializers.method("eva")
    assert method.start is eva and method.reads == "stats" and method.stat == Moments()
    assert initializers.method(Eva(whiten=True)).reads == "stats"
    config = lj.LoraConfig({"w": {"init": Eva(whiten=True)}}, rank=2, init="eva")
    plan = lj.plan(
        config, {"w": WEIGHT}, roles={"w": {"inputs": (0,), "outputs": (1,)}}
    )
    assert [site.init for site in plan] == [Eva(whiten=True)]
    assert Eva() == Eva() and hash(Eva()) == hash(Eva()) and Eva() != Eva(whiten=True)


def test_a_nan_shows():
    state = gathered(Moments(), [rows(9).at[2, 3].set(jnp.nan)])
    assert np.isnan(start(state).a).all()


@pytest.mark.parametrize(
    "state, rank, match",
    [
        (None, 3, r"init='eva'` starts from statistics .* none were given.*capture\("),
        (
            SecondMoment().init(D),
            3,
            r"for `principal`.* SecondMomentState, do not know",
        ),
        (Moments().init(5), 3, r"rows of 5 values for a weight that is fed rows of 12"),
        (
            Moments().init(D),
            13,
            r"starts 13 columns .* rows of 12 values.*Lower `rank`",
        ),
        (Pca(2).init(D), 3, r"3 principal directions .* 2 were gathered"),
    ],
)
def test_statistics_that_do_not_fit(state, rank, match):
    error = CaptureError if "principal d" not in match else ValueError
    with pytest.raises(error, match=match):
        start(state, rank)
