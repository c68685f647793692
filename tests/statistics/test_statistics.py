"""What every statistic promises, beside slow sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, tolerance
from streams import D, gathered, rows, step

from lorax_jax.statistics import Moments, Pca, SecondMoment, Sketch

K = 3
STATS = {
    "moments": Moments(),
    "second_moment": SecondMoment(),
    "second_moment_plain": SecondMoment(normalize=False),
    "pca": Pca(K),
    "sketch": Sketch(K, columns=6),
}
every = pytest.mark.parametrize("stat", STATS.values(), ids=list(STATS))
# Those whose states do not depend on how rows were spread over batches.
additive = pytest.mark.parametrize(
    "stat",
    [STATS["moments"], STATS["second_moment_plain"], STATS["sketch"]],
    ids=["moments", "second_moment_plain", "sketch"],
)


def same(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


@every
def test_hashable_and_equal_by_value(stat):
    import copy

    assert stat == copy.copy(stat) and hash(stat) == hash(copy.copy(stat))


@every
def test_sums_add_over_uses_and_pieces(stat):
    """Observing in two pieces and adding is observing both: one batch of two uses."""
    x, y = rows(8), rows(5, seed=1)
    state = gathered(stat, [rows(9, seed=2)])
    context = stat.context(state)
    pieces = stat.observe(x, None, context), stat.observe(y, None, context)
    assert all(z.dtype == jnp.float32 for z in jax.tree.leaves(pieces))
    found = stat.update(state, jax.tree.map(jnp.add, *pieces))
    if stat == SecondMoment():  # whose uses are divided by a maximum each
        assert float(found.calls) == 3
        expected = sum(
            np.asarray(z, np.float64).T
            @ np.asarray(z, np.float64)
            / float(z.max()) ** 2
            for z in (rows(9, seed=2), x, y)
        )
        assert_close(found.products, expected)
    else:
        whole = step(stat, state, jnp.concatenate([x, y]))
        whole = (
            whole
            if not hasattr(whole, "calls")
            else type(whole)(found.calls, whole.products)
        )
        # Singular values near zero come with the root of the error.
        assert_close(found, whole, factor=20 if isinstance(stat, Pca) else 1)


@additive
def test_order_and_merging_do_not_count(stat):
    batches = [rows(n, seed=n) for n in (7, 1, 20, 4)]
    expected = gathered(stat, batches)
    assert_close(gathered(stat, batches[::-1]), expected)
    halves = gathered(stat, batches[:2]), gathered(stat, batches[2:])
    assert_close(stat.merge(*halves), expected)
    assert_close(stat.merge(*halves[::-1]), expected)


@every
def test_merging_with_nothing_changes_nothing(stat):
    state, empty = gathered(stat, [rows(8), rows(6, seed=1)]), stat.init(D)
    assert_close(stat.merge(state, empty), state, factor=4)
    merged = stat.merge(empty, state)
    if isinstance(stat, Pca):  # but for how far the last batch turned it
        np.testing.assert_array_equal(merged.similarity, -np.ones(K))
        merged = type(merged)(**{**vars(merged), "similarity": state.similarity})
    assert_close(merged, state, factor=4)


@every
def test_no_rows(stat):
    """No rows at all, and rows of no weight, which may hold anything."""
    state = gathered(stat, [rows(8)])
    nothing = step(stat, state, jnp.zeros((0, D)))
    masked = step(stat, state, jnp.full((4, D), jnp.nan), jnp.zeros(4))
    assert_close(nothing, state, length=1)
    assert_close(masked, state, length=1)
    fresh = step(stat, stat.init(D), jnp.zeros((0, D)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(fresh))


@every
def test_masked_rows_do_not_count(stat):
    x = rows(9)
    weights = jnp.array([1, 0, 1, 1, 0, 1, 1, 1, 0], jnp.float32)
    spoilt = jnp.where(weights[:, None] > 0, x, jnp.nan)
    found = step(stat, stat.init(D), spoilt, weights)
    assert_close(found, step(stat, stat.init(D), x[weights > 0]), factor=4)


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_shows(stat, bad):
    state = gathered(stat, [rows(8)])
    state = step(stat, state, rows(8, seed=1).at[3, 5].set(bad))
    state = step(stat, state, rows(8, seed=2))
    assert not all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    derived = [getattr(state, name, None) for name in ("principal", "second_moment")]
    for found in (
        fn(2) if fn.__name__ == "principal" else fn() for fn in derived if fn
    ):
        first = jax.tree.leaves(found)[0]
        assert not np.isfinite(first).all()


@every
def test_bf16_rows_are_summed_in_float32(stat):
    x = rows(64).astype(jnp.bfloat16)
    found = step(stat, stat.init(D), x)
    assert all(z.dtype == jnp.float32 for z in jax.tree.leaves(found))
    same(found, step(stat, stat.init(D), x.astype(jnp.float32)))


@every
def test_layers_are_mapped_over(stat):
    layers = jnp.stack([rows(8, seed=i) for i in range(3)])
    more = jnp.stack([rows(9, seed=i + 5) for i in range(3)])
    states = jax.vmap(lambda _: stat.init(D))(jnp.arange(3))

    @jax.jit
    def both(states):
        for x in (layers, more):
            states = jax.vmap(lambda state, x: step(stat, state, x))(states, x)
        return states

    states = both(states)
    for i in range(3):
        one = gathered(stat, [layers[i], more[i]])
        assert_close(jax.tree.map(lambda x, i=i: x[i], states), one, factor=8)


@every
def test_types_without_values(stat):
    state = jax.eval_shape(lambda: stat.init(D))
    x = jax.ShapeDtypeStruct((8, D), jnp.bfloat16)
    after = jax.eval_shape(lambda state, x: step(stat, state, x), state, x)
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), (state, after))
    assert kinds[0] == kinds[1]
    assert jax.tree.structure(after) == jax.tree.structure(state)


@every
def test_all_products_are_in_full_precision(stat):
    """The default is bf16 on a TPU and TF32 on recent GPUs, which no CPU test sees."""

    def fn(x):
        state = step(stat, stat.init(D), x)
        principal = getattr(state, "principal", None)
        return stat.merge(state, state), principal and principal(2)

    jaxpr = jax.make_jaxpr(fn)(rows(8))
    from lorax_jax.transform._jaxpr import equations

    ours = [
        eqn.params["precision"]
        for eqn in equations(jaxpr.jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    highest = jax.lax.Precision.HIGHEST
    assert ours and all(found == (highest, highest) for found in ours)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_moments_beside_float64(offset):
    """Also around a mean 100 times the largest deviation, from the second batch on."""
    batches = [rows(n, seed=n, offset=offset) for n in (40, 9, 33)]
    state = gathered(Moments(), batches)
    x = np.concatenate(batches).astype(np.float64)
    assert float(state.count) == len(x)
    assert_close(state.mean, x.mean(0))
    # The first batch is summed about zero, and loses the square of mean / deviation.
    lost = 1 + (x.mean(0) ** 2).max() / x.var(0).max()
    assert_close(state.covariance(), np.cov(x.T, bias=True), factor=lost)
    assert_close(state.second_moment(), x.T @ x / len(x))


def test_later_batches_lose_nothing_to_the_mean():
    first, later = rows(2, offset=1000.0), rows(400, seed=1, offset=1000.0)
    state = gathered(Moments(), [first, later])
    x = np.concatenate([first, later]).astype(np.float64)
    error = np.abs(state.scatter - np.cov(x.T, bias=True) * len(x)).max()
    # Summed about zero, all 402 squares of 1000 would lose their eighth digit.
    assert error < 8 * np.finfo(np.float32).eps * 1000**2 * np.sqrt(2)


def test_one_row():
    """Has a mean and no spread."""
    x = rows(1)
    state = gathered(Moments(), [x])
    np.testing.assert_array_equal(state.mean, x[0])
    assert_close(state.covariance() + 1, np.ones((D, D)))
    state = gathered(Sketch(2), [x])
    assert float(state.principal(2).variances.max()) < tolerance(jnp.float32, D, 8)
    state = gathered(Pca(1), [x])
    assert float(state.count) == 1
    assert float(state.principal(1).variances[0]) < tolerance(jnp.float32, D, 8)


def test_second_moment_divides_by_the_signed_maximum():
    x = -jnp.abs(rows(6)) - 1
    found = gathered(SecondMoment(), [x, 2 * x]).second_moment()
    y = np.asarray(x, np.float64) / abs(float(x.max()))
    assert_close(found, y.T @ y)


def test_second_moment_of_zeros():
    """There is no maximum to divide by, and nothing to divide."""
    state = gathered(SecondMoment(), [jnp.zeros((3, D))])
    assert float(state.calls) == 1 and not state.second_moment().any()


def test_a_use_that_no_row_reaches_is_not_counted():
    state = gathered(SecondMoment(), [rows(6)])
    after = step(SecondMoment(), state, rows(6), jnp.zeros(6))
    assert float(after.calls) == 1
    same(after, state)
