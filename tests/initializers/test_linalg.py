"""Singular triplets against LAPACK's, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tolerance

from lorax_jax import _linalg
from lorax_jax._linalg import random_error, residual, svd_random, svd_top


def with_spectrum(values, n, m, seed=0):
    """A matrix with these singular values."""
    rng = np.random.default_rng(seed)
    k = len(values)
    u, v = (np.linalg.qr(rng.standard_normal((x, k)))[0] for x in (n, m))
    return jnp.asarray(u * values @ v.T, jnp.float32)


def flat(n, m):
    """Noise alone, whose leading values lie close together."""
    return jnp.asarray(np.random.default_rng(1).standard_normal((n, m)), jnp.float32)


STEEP = np.logspace(0, -6, 120)
SLOW = 1 / np.arange(1, 121)
SLOW_END = np.arange(1, 120)
MATRICES = {
    "noise": flat(160, 120),
    "wide": flat(120, 160),
    "steep": with_spectrum(STEEP, 160, 120),
    "slow": with_spectrum(SLOW, 120, 160),
    "equal": with_spectrum(np.ones(120), 160, 120),
    "rank 3": with_spectrum(np.array([3.0, 2.0, 1.0]), 160, 120),
    "zero": jnp.zeros((160, 120)),
    "outlier": with_spectrum(np.r_[1e4, 1 / np.sqrt(SLOW_END)], 160, 120),
    "mean": 0.02 * flat(160, 120) + 20,
    "huge": flat(160, 120) * 1e12,
    "tiny": flat(160, 120) * 1e-12,
}


def orthonormal(x):
    return np.abs(np.asarray(x.T @ x) - np.eye(x.shape[1])).max() < 1e-5


# By iteration, by eigenvectors of the Gram matrix, and in full.
@pytest.mark.parametrize("k", [1, 6, 24, 120])
@pytest.mark.parametrize("name", MATRICES)
def test_leading_triplets(name, k):
    w = MATRICES[name]
    found = jax.jit(lambda w: svd_top(w, k))(w)
    exact = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
    assert found.u.shape == (w.shape[0], k) and found.v.shape == (w.shape[1], k)
    np.testing.assert_allclose(
        found.s, exact[:k], rtol=0, atol=tolerance(jnp.float32, 120) * exact[0]
    )
    assert orthonormal(found.u) and orthonormal(found.v)
    assert residual(w, found) <= _linalg.ACCEPTED
    # The signs are fixed.
    at = np.abs(np.asarray(found.v)).argmax(0)
    assert (np.take_along_axis(np.asarray(found.v), at[None], 0) > 0).all()


def test_what_does_not_converge_is_decomposed_in_full(monkeypatch):
    _linalg._svd._svd_top.cache_clear()
    monkeypatch.setattr(_linalg._filter, "_ROUNDS", 0)
    w = MATRICES["noise"]
    found = svd_top(w, 6)
    _linalg._svd._svd_top.cache_clear()
    exact = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
    np.testing.assert_allclose(found.s, exact[:6], rtol=1e-5)


def test_mapped_one_after_the_other():
    w = jnp.stack([MATRICES[name] for name in ("noise", "steep", "zero")])
    many = jax.jit(jax.vmap(lambda w: svd_top(w, 6)))(w)
    for i in range(3):
        alone = svd_top(w[i], 6)
        np.testing.assert_allclose(many.s[i], alone.s, rtol=1e-5)


def test_bfloat16():
    w = MATRICES["slow"].astype(jnp.bfloat16)
    found = svd_top(w, 4)
    assert found.u.dtype == jnp.float32
    exact = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
    np.testing.assert_allclose(found.s, exact[:4], rtol=1e-5)


@pytest.mark.parametrize("iterations", [0, 1, 4, 20])
@pytest.mark.parametrize("name", MATRICES)
def test_randomized(name, iterations, key):
    """Within the stated bound, and the loss is what the values say it is."""
    w, k = MATRICES[name], 6
    decompose = jax.jit(lambda w, key: svd_random(w, k, iterations=iterations, key=key))
    found = decompose(w, key)
    dense = np.asarray(w, np.float64)
    exact = np.linalg.svd(dense, compute_uv=False)
    u, s, v = (np.asarray(x, np.float64) for x in found)
    left = dense - u * s @ v.T
    bound = random_error(*w.shape, k)
    rounding = tolerance(jnp.float32, 120) * exact[0]
    assert np.linalg.norm(left, 2) <= bound * exact[k] + rounding
    lost = np.sum(dense**2) - np.sum(s**2)
    total = np.sum(dense**2)
    assert abs(np.sum(left**2) - lost) <= 1e-5 * total
    if exact[k - 1] > 0:
        assert orthonormal(u) and orthonormal(v)
    if iterations == 20:
        assert np.sum(left**2) <= 1.002 * np.sum(exact[k:] ** 2) + 1e-6 * total


def captured(w, found):
    """The energy that the left vectors hold, as a share of what as many can."""
    best = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)[: len(found.s)]
    return np.sum((np.asarray(found.u.T) @ np.asarray(w)) ** 2) / np.sum(best**2)


def test_more_iterations_capture_more(key):
    w = MATRICES["noise"]
    found = [
        float(captured(w, svd_random(w, 6, iterations=n, key=key))) for n in (0, 1, 4)
    ]
    assert found[0] < found[1] < found[2] <= 1 + 1e-5
    assert captured(w, svd_top(w, 6)) == pytest.approx(1, abs=1e-5)


def test_wrong_input(key):
    w = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"4 singular .* shape \(4, 3\), which has 3"):
        svd_top(w, 4)
    with pytest.raises(ValueError, match=r"0 singular .* shape \(4, 3\), which has 3"):
        svd_random(w, 0, iterations=1, key=key)
    with pytest.raises(ValueError, match="`iterations` = -1; a number from 0 up"):
        svd_random(w, 1, iterations=-1, key=key)
