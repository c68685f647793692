"""Principal directions: beside a decomposition in float64, and PEFT's recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, tolerance
from streams import D, gathered, rows, step

from lorax_jax._linalg import RELATIVE
from lorax_jax.statistics import Moments, Pca, Sketch
from lorax_jax.statistics._eigen import leading


def exact(x, k):
    """The `k` leading right singular vectors of centred rows, upright."""
    x = np.asarray(x, np.float64)
    _, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return upright(vt[:k].T), s[:k] ** 2 / len(x), x.var(0).sum()


def upright(vectors):
    at = np.abs(vectors).argmax(0)
    return vectors * np.sign(vectors[at, np.arange(vectors.shape[1])])


def recurrence(batches, k):
    """Incremental PCA in float64, row by row as it is written."""
    count, mean, vt, s = 0, 0.0, None, None
    turned, everything = None, np.zeros((0, batches[0].shape[1]))
    for x in batches:
        x = np.asarray(x, np.float64)
        n, own = len(x), x.mean(0)
        stack = x - own
        if vt is not None:
            gap = np.sqrt(count * n / (count + n)) * (mean - own)
            stack = np.vstack([s[:, None] * vt, stack, gap])
        _, s, new = np.linalg.svd(stack, full_matrices=False)
        s, new = s[:k], upright(new[:k].T).T
        turned = None if vt is None else (new * vt).sum(1)
        vt, mean, count = new, (count * mean + n * own) / (count + n), count + n
        everything = np.vstack([everything, x])
    return vt, s, turned, s**2 / (everything.var(0).sum() * count)


@pytest.mark.parametrize("stat", [Moments(), Pca(4), Sketch(4)])
def test_directions_of_one_batch(stat):
    x = rows(60)
    found = gathered(stat, [x]).principal(4)
    vectors, variances, total = exact(x, 4)
    # A direction is known to epsilon times the first variance over the gap: the
    # variances fall fourfold, so the fourth has a 64th of the first. Rows about zero
    # cost the square of mean / deviation.
    assert_close(found.vectors, vectors, factor=4**4 * 4)
    assert_close(found.variances, variances, factor=16)
    assert_close(found.total, total, factor=16)
    assert float(found.count) == 60
    gram = np.asarray(found.vectors.T @ found.vectors)
    assert_close(gram, np.eye(4), factor=4)


def test_pca_is_the_recurrence():
    batches = [rows(n, seed=n) for n in (30, 8, 5, 21)]
    state = gathered(Pca(4), batches)
    vt, s, turned, explained = recurrence(batches, 4)
    assert_close(state.components, vt, factor=4**4 * 4)
    assert_close(state.singular, s, factor=16)
    assert_close(state.similarity, turned, factor=4**4 * 4)
    found = state.principal(4)
    assert_close(found.variances / found.total, explained, factor=16)
    # It is not what all rows at once would give, and that is PEFT's way.
    x = np.concatenate(batches)
    assert np.abs(state.components.T - exact(x, 4)[0]).max() > 1e-3
    assert_close(state.mean, x.mean(0))
    assert_close(state.variance, x.astype(np.float64).var(0), factor=16)


def test_pca_skips_batches_with_fewer_rows_than_components():
    state = gathered(Pca(4), [rows(20)])
    after = step(Pca(4), state, rows(3, seed=1))
    assert float(after.count) == 20
    np.testing.assert_array_equal(after.components, state.components)
    assert float(step(Pca(4), state, rows(4, seed=1)).count) == 24
    # Rows of no weight are none.
    masked = step(
        Pca(4), state, rows(9, seed=1), jnp.where(jnp.arange(9) < 3, 1.0, 0.0)
    )
    assert float(masked.count) == 20


def test_pca_keeps_what_the_state_says():
    """As if it had been made for two components."""
    import dataclasses

    batches = [rows(n, seed=n) for n in (30, 8, 3, 21)]
    state = dataclasses.replace(Pca(5).init(D), keep=jnp.float32(2))
    for x in batches:
        state = step(Pca(5), state, x)
    vt, s, turned, _ = recurrence(batches, 2)
    assert_close(state.components[:2], vt, factor=4**4 * 4)
    assert_close(state.singular[:2], s, factor=16)
    assert_close(state.similarity[:2], turned, factor=4**4 * 4)
    assert not state.components[2:].any() and not state.singular[2:].any()


def test_pca_merges_with_what_it_knows():
    """States of whole rank merge as if their rows had come in one after another."""
    batches = [rows(30), rows(25, seed=1)]
    one, other = (gathered(Pca(D), [x]) for x in batches)
    merged, expected = Pca(D).merge(one, other), gathered(Pca(D), batches)
    assert_close(merged.singular**2, expected.singular**2, factor=16)
    assert_close(merged.components[:4], expected.components[:4], factor=4**4 * 4)
    assert_close(merged.variance, expected.variance, factor=16)
    # With fewer, the variance outside them is still counted.
    one, other = (gathered(Pca(2), [x]) for x in batches)
    assert_close(Pca(2).merge(one, other).variance, expected.variance, factor=16)


def test_wide_pca_and_fewer_directions_than_asked():
    assert Pca(40).init(D).components.shape == (D, D)
    with pytest.raises(
        ValueError, match=r"5 principal .* 4 were gathered. .*`Pca\(5\)`"
    ):
        Pca(4).init(D).principal(5)
    with pytest.raises(ValueError, match=r"7 principal .* has 6 columns. .*`Sketch\(7"):
        Sketch(2, columns=6).init(D).principal(7)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: Pca(0), r"`Pca\(components=0\)` must be at least 1"),
        (lambda: Sketch(0), r"`Sketch\(components=0, columns=None\)` needs"),
        (lambda: Sketch(4, columns=3), r"components=4, columns=3\)` needs .* as many"),
    ],
)
def test_options_that_cannot_be(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_directions_of_wide_rows():
    """Of a matrix too wide to diagonalize in full, whose eigenvalues halve."""
    d, k = 96, 4
    q = np.linalg.qr(np.random.default_rng(3).standard_normal((d, d)))[0]
    values = 2.0 ** -np.arange(d)
    matrix = jnp.asarray((q * values) @ q.T, jnp.float32)
    found, vectors = jax.jit(leading, static_argnums=1)(matrix, k)
    assert_close(found, values[:k], factor=4)
    # A vector is right to what its residual, a share of its value, is of the gap,
    # half of it.
    error = np.abs(vectors - upright(q[:, :k])).max()
    assert error <= 2 * RELATIVE + tolerance(jnp.float32, d, 16)
    many = jax.vmap(lambda x: leading(x, k)[0])(jnp.stack([matrix, 3 * matrix]))
    assert_close(many[1], 3 * values[:k], factor=4)


def test_a_sketch_misses_no_more_than_its_bound():
    """In nuclear norm, averaged over seeds: what the best misses, about twice."""
    d, k, m, seeds = 48, 4, 10, 20
    rng = np.random.default_rng(5)
    x = rng.standard_normal((300, d)) * np.arange(1, d + 1) ** -1.0
    values = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    missed = []
    for seed in range(seeds):
        stat = Sketch(k, columns=m, seed=seed)
        found = gathered(stat, [jnp.asarray(x, jnp.float32)], d).principal(m)
        missed.append(float(found.total - found.variances.sum()))
    bound = (1 + k / (m - k - 1)) * values[k:].sum()
    assert 0 < np.mean(missed) <= bound
    # And no sketch is better than the best.
    assert min(missed) >= values[m:].sum() * (1 - tolerance(jnp.float32, d))


def test_a_sketch_of_few_rows_is_exact():
    """Fewer rows than columns: nothing is lost, and nothing divided by zero."""
    x = rows(4)
    found = gathered(Sketch(4, columns=8), [x]).principal(4)
    vectors, variances, total = exact(x, 3)
    assert_close(found.variances[:3], variances, factor=64)
    assert float(found.variances[3]) <= tolerance(jnp.float32, D, 64) * total
    assert_close(found.vectors[:, :2], vectors[:, :2], factor=4**4 * 4)
