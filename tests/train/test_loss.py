import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_jax.train import bits_per_byte, cross_entropy


def reference(logits, targets, weights):
    """In float64, by the definition."""
    logits = np.asarray(logits, np.float64)
    total = 0.0
    for index in np.ndindex(targets.shape):
        p = np.exp(logits[index]) / np.exp(logits[index]).sum()
        total -= weights[index] * np.log(p[targets[index]])
    return total / weights.sum()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_against_the_definition(dtype):
    draw = np.random.default_rng(0)
    logits = jnp.asarray(3 * draw.normal(size=(3, 5, 11)), dtype)
    targets = draw.integers(0, 11, (3, 5))
    weights = draw.integers(0, 3, (3, 5)).astype(np.float32)
    found = cross_entropy(logits, jnp.asarray(targets), jnp.asarray(weights))
    assert found.dtype == jnp.float32
    wanted = reference(logits.astype(jnp.float32), targets, weights)
    # A sum of 11 exponentials and a mean over 15 tokens, in float32.
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_parts_add_up_to_the_whole():
    key = jax.random.key(0)
    logits = jax.random.normal(key, (4, 6, 7))
    targets = jnp.arange(24).reshape(4, 6) % 7
    weights = (jnp.arange(24).reshape(4, 6) % 3 > 0).astype(jnp.float32)
    whole = cross_entropy(logits, targets, weights)
    parts = [
        cross_entropy(logits[i : i + 1], targets[i : i + 1], weights[i : i + 1], 16.0)
        for i in range(4)
    ]
    assert weights.sum() == 16
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)


def test_what_does_not_count_does_not_matter():
    logits = jnp.zeros((1, 2, 4)).at[0, 1].set(jnp.nan)
    loss = cross_entropy(logits, jnp.zeros((1, 2), int), jnp.array([[1.0, 0.0]]))
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)


def test_gradients_do_not_reach_tokens_without_weight():
    weights = jnp.array([[1.0, 0.0, 1.0]])
    targets = jnp.array([[1, 2, 3]])
    grads = jax.grad(cross_entropy)(jnp.ones((1, 3, 5)), targets, weights)
    assert (grads[0, 1] == 0).all() and (grads[0, 0] != 0).all()


def test_bits_per_byte():
    # Two tokens at probability 1/4 each make 4 bits, over 2 bytes.
    assert bits_per_byte(2 * np.log(4), size=2) == pytest.approx(2.0)
