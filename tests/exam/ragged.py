"""Layouts of ragged products."""

import jax
import jax.numpy as jnp
from jax import lax
from layout import OUT, D, Layout, role_of


def _ragged(w, x):
    """Rows in groups, one of them empty."""
    return lax.ragged_dot(x, w, jnp.array([2, 0, 5]))


def _ragged_transposed(w, x):
    numbers = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
    return lax.ragged_dot_general(x, w, jnp.array([2, 1, 4]), numbers)


def _ragged_batch(w, x):
    sizes = jnp.array([[2, 0, 5], [3, 3, 1]])
    return jax.vmap(lax.ragged_dot)(x, w, sizes)


def _ragged_experts(w, x):
    """Tokens sorted by their expert, multiplied group by group, and put back."""
    expert = jnp.argmax(x[:, : len(w)], axis=-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=len(w))
    return jnp.tanh(lax.ragged_dot(x[order], w, sizes))[jnp.argsort(order)]


def _ragged_scan(w, x):
    sizes = jnp.array([2, 1, 4])
    step = jax.checkpoint(lambda x, w: jnp.tanh(lax.ragged_dot(x, w, sizes)))
    return lax.scan(lambda x, w: (step(x, w), None), x, w)[0]


RAGGED = [
    Layout(
        "ragged",
        _ragged,
        (3, D, OUT),
        (7, D),
        role_of((1,), (2,), (0,)),
        maps=False,
    ),
    Layout(
        "ragged_transposed",
        _ragged_transposed,
        (3, OUT, D),
        (7, D),
        role_of((2,), (1,), (0,)),
        maps=False,
    ),
    Layout(
        "ragged_batch",
        _ragged_batch,
        (2, 3, D, OUT),
        (2, 7, D),
        role_of((2,), (3,), (0, 1)),
        maps=False,
    ),
    Layout(
        "ragged_experts",
        _ragged_experts,
        (3, D, OUT),
        (7, D),
        role_of((1,), (2,), (0,)),
        maps=False,
    ),
    Layout(
        "ragged_scan",
        _ragged_scan,
        (2, 3, D, D),
        (7, D),
        role_of((2,), (3,), (0, 1), stack=1),
        depth=2,
        maps=False,
    ),
]
