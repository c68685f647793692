"""The two halves of a randomized decomposition: a basis, and the triplets in it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._linalg import signs
from ..statistics import GradientFactors


@jax.jit
def basis(y: Float[Array, "*n rows size"]) -> Float[Array, "*n rows size"]:
    """Orthonormal columns whose span holds that of `y`'s; `size` at most `rows`."""
    return jnp.linalg.qr(_of_order_one(y)[0])[0]


@jax.jit
def triplets_of_columns(
    y: Float[Array, "*n d_in size"], v: Float[Array, "*n size d_out"]
) -> GradientFactors:
    r"""The singular triplets of $G$ from $Y = G V^\top$, $V$ with orthonormal rows.

    Where the rows of $V$ span those of $G$, $G = Y V$, and with $Y = Q R$ and
    $R = \tilde U S \tilde V$ the triplets are $Q \tilde U, S, \tilde V V$.
    """
    left, s, right = _triplets(y)
    return _signed(left, s, jnp.matmul(right, v, precision="highest"))


@jax.jit
def triplets_of_rows(
    z: Float[Array, "*n size d_out"], u: Float[Array, "*n d_in size"]
) -> GradientFactors:
    r"""The same from $Z = U^\top G$, $U$ with orthonormal columns."""
    right, s, left = _triplets(z.mT)  # Z^T = right s left
    left = jnp.matmul(u, left.mT, precision="highest")
    return _signed(left, s, right.mT)


def _triplets(y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    y, size = _of_order_one(y)
    q, r = jnp.linalg.qr(y)
    u, s, v = jnp.linalg.svd(r)  # small: (*n, size, size)
    return jnp.matmul(q, u, precision="highest"), s * size[..., 0], v


def _signed(u: jax.Array, s: jax.Array, v: jax.Array) -> GradientFactors:
    sign = signs(u)
    return GradientFactors(u * sign, s, v * sign.mT)


def _of_order_one(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`y` by its largest entry, so that no square underflows, and that entry.

    Gradients of a mean over many tokens are small: 1e-20 and less happens, the square
    of which float32 does not have.
    """
    size = jnp.abs(y).max(axis=(-1, -2), keepdims=True)
    return y / jnp.where(size > 0, size, 1), size
