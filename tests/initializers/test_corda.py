"""CorDA: parts of the weight, chosen by what its inputs use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, draw, tolerance
from streams import D, gathered, rows

from lorax_jax import initializers
from lorax_jax.errors import CaptureError, ConfigError
from lorax_jax.initializers import Corda, corda, corda_kpm
from lorax_jax.initializers._corda import _damped
from lorax_jax.statistics import Moments, SecondMoment, Sketch

KEY = jax.random.key(0)
WEIGHT = draw(KEY, (D, 7))
STATE = gathered(SecondMoment(), [rows(40), rows(30, seed=1)])


def start(state=STATE, rank=3, weight=WEIGHT, scale=2.0, **options):
    method = initializers.get(Corda(**options))
    return method(weight, rank=rank, scale=scale, key=KEY, stats=state)


def reference(second, weight, rank, mode, damping=0.01):
    """`W C' = U S V^T` on the transposed weight, as PEFT writes it, in float64."""
    c, w = np.asarray(second, np.float64), np.asarray(weight, np.float64).T
    c = c + damping * np.diag(c).mean() * np.eye(len(c))
    u, s, vt = np.linalg.svd(w @ c, full_matrices=False)
    v = (vt @ np.linalg.inv(c)).T
    sel = slice(0, rank) if mode == "ipm" else slice(len(s) - rank, None)
    return v[:, sel], s[sel], u[:, sel]


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("shape", [(D, 7), (D, 20), (D, D)])
def test_factors(mode, shape):
    weight = draw(KEY, shape)
    found = start(weight=weight, mode=mode)
    v, s, u = reference(STATE.second_moment(), weight, 3, mode)
    # Directions of the product lose its condition, of which C' has at most 100 D.
    factor = 100 if mode == "kpm" else 1
    assert_close(2.0 * found.a @ found.b, (v * s) @ u.T, factor=4 * factor)
    signs = np.sign((np.asarray(found.b) * u.T).sum(1))
    assert_close(np.asarray(found.a) * signs, v * np.sqrt(s / 2.0), factor=16 * factor)
    assert_close(found.b * signs[:, None], (u * np.sqrt(s / 2.0)).T, factor=16 * factor)
    assert found.a0 is found.a and found.b0 is found.b


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_all_directions_are_the_weight(mode):
    found = start(rank=7, mode=mode, scale=0.5)
    assert_close(0.5 * found.a @ found.b, WEIGHT, factor=8)


def test_modes_take_opposite_ends():
    """What the one leaves is what the other takes."""
    ipm, kpm = start(rank=3), start(rank=4, mode="kpm")
    assert_close(2.0 * (ipm.a @ ipm.b + kpm.a @ kpm.b), WEIGHT, factor=100)


def test_the_size_of_the_inputs_hardly_counts():
    """Neither damping nor directions know it; sizes of A and B trade places."""
    other = type(STATE)(STATE.calls, 1000 * STATE.products)
    one, two = start(), start(other)
    assert_close(two.a @ two.b, one.a @ one.b, factor=16)


def test_a_batch_of_large_activations_weighs_more_without_maxima():
    """Under the default it does not; `Moments` is the other but for its size."""
    calm, loud = [rows(40), rows(30, seed=1)], [rows(40), 100 * rows(30, seed=1)]
    starts = {
        (stat, name): start(gathered(stat, batches))
        for stat in (SecondMoment(), SecondMoment(normalize=False), Moments())
        for name, batches in (("calm", calm), ("loud", loud))
    }
    products = {key: found.a @ found.b for key, found in starts.items()}
    usual, plain, moments = SecondMoment(), SecondMoment(normalize=False), Moments()
    assert_close(products[usual, "loud"], products[usual, "calm"], factor=16)
    for name in ("calm", "loud"):
        assert_close(products[moments, name], products[plain, name], factor=100)
    change = products[moments, "loud"] - products[moments, "calm"]
    assert jnp.linalg.norm(change) > 0.05 * jnp.linalg.norm(products[moments, "calm"])


def test_damping_is_doubled_until_the_inverse_is_one():
    """One direction carries 1e9 of the others: float32 cannot invert that."""
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))[0]
    second = jnp.asarray((q * np.geomspace(1e12, 1e-6, 64)) @ q.T, jnp.float32)
    second = (second + second.T) / 2
    mean = float(jnp.diagonal(second).mean())

    def damping(options):
        moved = np.diagonal(np.asarray(_damped(second, options) - second))
        return float(np.median(moved)) / mean

    first = Corda(damping=1e-9)
    found = damping(first)
    doublings = np.log2(found / first.damping)
    assert doublings > 3 and abs(doublings - round(doublings)) < 0.1
    inverse = jnp.linalg.inv(_damped(second, first))
    product = jnp.matmul(_damped(second, first), inverse, precision="highest")
    assert np.linalg.norm(product - np.eye(64)) < 0.05
    # With a stricter demand, more is added; with PEFT's first damping, no more.
    assert damping(Corda(damping=1e-9, tolerance=0.005)) > found
    assert abs(damping(Corda()) - 0.01) < 1e-3


def test_each_layer_searches_for_itself():
    states = jax.tree.map(lambda x: jnp.stack([x, 3 * x]), STATE)
    weights = jnp.stack([WEIGHT, 2 * WEIGHT])
    found = jax.jit(jax.vmap(lambda w, s: start(s, weight=w)))(weights, states)
    one = start(jax.tree.map(lambda x: x[1], states), weight=weights[1])
    second = jax.tree.map(lambda x: x[1], found)
    assert_close(second.a @ second.b, one.a @ one.b, factor=16)


@pytest.mark.parametrize(
    "state",
    [
        gathered(SecondMoment(), [rows(9).at[1, 1].set(jnp.nan)]),
        gathered(SecondMoment(), [rows(9).at[1, 1].set(jnp.inf)]),
        SecondMoment().init(D),
    ],
    ids=["nan", "inf", "nothing"],
)
def test_what_cannot_be_inverted_shows(state):
    """And the search for a damping ends."""
    assert not np.isfinite(jax.jit(start)(state).a).all()


def test_a_weight_of_lower_rank():
    """Directions that it has not are zero, as they are in the weight."""
    weight = WEIGHT.at[:, 2:].set(0)
    found = start(weight=weight, mode="kpm", rank=5)
    assert np.isfinite(found.a).all() and np.isfinite(found.b).all()
    size = tolerance(jnp.float32, D) * float(jnp.abs(weight).max())
    assert float(jnp.abs(2.0 * found.a @ found.b).max()) <= size


def test_registered():
    assert initializers.get("corda") is initializers.get("corda_ipm") is corda
    assert initializers.get("corda_kpm") is corda_kpm
    for name in ("corda", "corda_ipm", "corda_kpm", Corda("kpm")):
        method = initializers.method(name)
        assert (method.reads, method.stat) == ("stats", SecondMoment())
    named = initializers.get("corda_kpm")(
        WEIGHT, rank=3, scale=2.0, key=KEY, stats=STATE
    )
    np.testing.assert_array_equal(named.a, start(mode="kpm").a)


def test_bf16_weights_and_covariances():
    """A weight of any dtype; and the second moment that `Moments` knows."""
    low = start(weight=WEIGHT.astype(jnp.bfloat16))
    high = start(weight=WEIGHT.astype(jnp.bfloat16).astype(jnp.float32))
    assert low.a.dtype == jnp.float32
    np.testing.assert_array_equal(low.a, high.a)
    state = gathered(Moments(), [rows(40), rows(30, seed=1)])
    v, s, u = reference(state.second_moment(), WEIGHT, 3, "ipm")
    found = start(state)
    assert_close(2.0 * found.a @ found.b, (v * s) @ u.T, factor=4)


@pytest.mark.parametrize(
    "state, rank, error, match",
    [
        (None, 3, CaptureError, r"init='corda'` starts from statistics .* none were"),
        (Sketch(2).init(D), 3, CaptureError, r"`second_moment`.* SketchState, do not"),
        (SecondMoment().init(5), 3, CaptureError, r"rows of 5 values .* rows of 12"),
        (STATE, 8, ValueError, r"`rank` = 8 exceeds .*\(12, 7\) kernel can have, 7"),
    ],
)
def test_what_does_not_fit(state, rank, error, match):
    with pytest.raises(error, match=match):
        start(state, rank)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"mode": "imp"}, r"mode='imp'\)`: one of 'ipm', 'kpm'"),
        ({"damping": 0.0}, r"damping=0.0\)`: a positive number"),
        ({"tolerance": float("nan")}, r"tolerance=nan\)`: a positive number"),
    ],
)
def test_options_that_cannot_be(options, match):
    with pytest.raises(ConfigError, match=match):
        Corda(**options)
