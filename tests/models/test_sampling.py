"""Top-p and temperature against their definitions, counted over many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_jax.models._sampling import GREEDY, NUCLEUS, PLAIN, nucleus, sample

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32)


def _draw(kind, temperature, top_p, n=20_000):
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (n, 5))
    tokens = sample(
        logits,
        kind=kind,
        key=jax.random.key(0),
        temperature=jnp.array([temperature]),
        top_p=jnp.array([top_p]),
    )
    return np.bincount(np.asarray(tokens), minlength=5) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_is_a_power_of_the_probabilities(temperature):
    wanted = PROBABILITIES ** (1 / temperature)
    wanted /= wanted.sum()
    # 20,000 draws: one standard error is at most 0.0036.
    np.testing.assert_allclose(_draw(PLAIN, temperature, 1.0), wanted, atol=0.015)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, [1]), (0.5, [1, 3]), (0.8, [1, 3, 4]), (0.99, [0, 1, 2, 3, 4])],
)
def test_top_p_keeps_the_likeliest_and_renormalizes(top_p, kept):
    wanted = np.zeros(5)
    wanted[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    np.testing.assert_allclose(_draw(NUCLEUS, 1.0, top_p), wanted, atol=0.015)


def test_top_p_of_each_row():
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (2, 5))
    kept = jnp.isfinite(nucleus(logits, jnp.array([0.3, 0.8])))
    assert kept.sum(axis=1).tolist() == [1, 3]


def test_top_p_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import TopPLogitsWarper

    logits = np.random.default_rng(0).normal(size=(16, 50)).astype(np.float32) * 3
    ids = torch.zeros((16, 1), dtype=torch.long)  # not looked at
    for top_p in (0.1, 0.5, 0.9, 0.99):
        wanted = TopPLogitsWarper(top_p)(ids, torch.tensor(logits)).numpy()
        ours = nucleus(jnp.asarray(logits), jnp.array([top_p]))
        np.testing.assert_array_equal(ours, wanted)


def test_greedy_takes_the_first_of_the_likeliest():
    logits = jnp.array([[1.0, 3.0, 3.0]], jnp.bfloat16)
    ones = jnp.ones(1)
    token = sample(logits, kind=GREEDY, key=None, temperature=ones, top_p=ones)
    assert token.tolist() == [1]
