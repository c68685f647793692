"""Starting factors that PEFT took out of a weight."""

import numpy as np
import pytest

from lorax_jax.checkpoint._peft_starts import olora, pissa

SHAPES = [(12, 7), (7, 12), (9, 9)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_principal_components(shape, rank):
    weight = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    a0, b0 = pissa(weight, rank, 1.75)
    wanted = (u[:, :rank] * s[:rank]) @ vt[:rank]
    np.testing.assert_allclose(1.75 * a0 @ b0, wanted, atol=1e-12)
    # Both have the root of the singular values, the largest first.
    for factor in (np.linalg.norm(a0, axis=0), np.linalg.norm(b0, axis=1)):
        np.testing.assert_allclose(factor, np.sqrt(s[:rank] / 1.75), atol=1e-12)


def test_singular_values_that_are_near_to_each_other():
    """In float32 their vectors would be mixed by a part in a thousand."""
    draw = np.random.default_rng(1)
    left, right = (np.linalg.qr(draw.normal(0, 1, (9, 9)))[0] for _ in range(2))
    values = np.array([2, 1 + 1e-4, 1, 0.5, 0.4, 0.3, 0.2, 0.1, 0])
    a0, b0 = pissa((left * values) @ right, 2, 1.0)
    wanted = (left[:, :2] * values[:2]) @ right[:2]
    np.testing.assert_allclose(a0 @ b0, wanted, atol=1e-10)


def test_a_weight_of_a_smaller_rank():
    weight = np.outer([1.0, 2, 3], [1.0, -1])
    a0, b0 = pissa(weight, 2, 2.0)
    assert np.isfinite(a0).all() and np.isfinite(b0).all()
    np.testing.assert_allclose(2 * a0 @ b0, weight, atol=1e-7)
    assert not pissa(np.zeros((3, 2)), 1, 1.0)[1].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_of_the_orthogonal_factor(shape):
    weight = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    q, r = np.linalg.qr(weight.astype(np.float64).T)
    a0, b0 = olora(weight, 3, 1.75)
    np.testing.assert_allclose(a0 @ b0, (q[:, :3] @ r[:3]).T, atol=1e-12)
    np.testing.assert_allclose(b0 @ b0.T, np.eye(3), atol=1e-12)
