"""Tokens, and short words for where they are."""

import jax
import jax.numpy as jnp

from lorax_jax.transform import Lost, follow
from lorax_jax.transform._jaxpr import equations

B, S, D = 2, 6, 4
X = jnp.ones((B, S, D))
W = jnp.ones((D, D))
TOKENS = jnp.arange(1, B * S + 1, dtype=jnp.float32).reshape(B, S)


def trace(fn, *args, starts=None):
    """The followed jaxpr of `fn`, whose first argument holds the tokens."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    return jaxpr, follow(jaxpr, {0: (0, 1)} if starts is None else starts)


def results(fn, *args, starts=None):
    return trace(fn, *args, starts=starts)[1].results


def said(axes):
    """Axes in short: the labels along each, merged ones together, `-` for lost."""

    def one(axis):
        return "-" if isinstance(axis, Lost) else tuple(s.label for s in axis)

    return [one(axis) for axis in axes]


def products(jaxpr):
    return [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]


BATCH, SEQ = (0,), (1,)


def with_weight_of(jaxpr):
    return [e for e in products(jaxpr) if e.invars[1].aval.shape == (D, D)]
