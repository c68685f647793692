"""Rows that statistics take in, batch by batch."""

import jax.numpy as jnp
import numpy as np

D = 12


def rows(n, seed=0, offset=2.0):
    """Rows with a clear order of directions, around a mean that is not zero."""
    rng = np.random.default_rng(seed)
    scales = 2.0 ** -np.arange(D)
    mixed = np.linalg.qr(np.random.default_rng(7).standard_normal((D, D)))[0]
    x = (rng.standard_normal((n, D)) * scales) @ mixed.T + offset
    return jnp.asarray(x, jnp.float32)


def step(stat, state, x, weights=None):
    return stat.update(state, stat.observe(x, weights, stat.context(state)))


def gathered(stat, batches, size=D):
    state = stat.init(size)
    for x in batches:
        state = step(stat, state, x)
    return state
