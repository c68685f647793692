"""The four small modules both families are built from, each a few `jnp` operations.

Weights take part in plain operations only: a kernel in one `dot_general`, a table in
one gather (and, tied, one `dot_general`), scales and biases in one product or sum. They
are cast to the module's `dtype` on use, which does nothing when they have it already.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


def spread(vector: Float[Array, "width"], rank: int) -> Float[Array, "..."]:
    """Adds leading axes to a vector until it has `rank` axes.

    NumPy would do so by itself; written out, the code also runs where
    `jax_numpy_rank_promotion` is `"raise"`.
    """
    return vector.reshape((1,) * (rank - 1) + vector.shape)


class Linear(nnx.Module):
    """`x @ kernel + bias`, with `kernel` of shape `(d_in, d_out)`."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        use_bias: bool,
        std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        draw = std * jax.random.normal(rngs.params(), (d_in, d_out), jnp.float32)
        self.kernel = nnx.Param(draw.astype(dtype))
        self.bias = nnx.Param(jnp.zeros((d_out,), dtype)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*lead d_in"]) -> Float[Array, "*lead d_out"]:
        y = x @ self.kernel[...].astype(self.dtype)
        if self.bias is not None:
            y = y + spread(self.bias[...].astype(self.dtype), y.ndim)
        return y


class Embed(nnx.Module):
    """A table of vectors: looked up with `embed(ids)`, a head with `attend(x)`."""

    def __init__(
        self, rows: int, width: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        draw = std * jax.random.normal(rngs.params(), (rows, width), jnp.float32)
        self.embedding = nnx.Param(draw.astype(dtype))
        self.dtype = dtype

    def __call__(self, ids: Int[Array, "*lead"]) -> Float[Array, "*lead width"]:
        # An id outside the table gives a NaN, not some other token's row.
        return jnp.take(self.embedding[...], ids, axis=0).astype(self.dtype)

    def attend(self, x: Float[Array, "*lead width"]) -> Float[Array, "*lead rows"]:
        table = self.embedding[...].astype(self.dtype)
        return jax.lax.dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())))


class RMSNorm(nnx.Module):
    r"""$x / \sqrt{\mathrm{mean}(x^2) + \epsilon} \cdot$ `scale`, in float32 inside."""

    def __init__(self, width: int, *, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*lead width"]) -> Float[Array, "*lead width"]:
        wide = x.astype(jnp.float32)
        power = jnp.mean(wide * wide, axis=-1, keepdims=True)  # (..., 1)
        normed = (wide * jax.lax.rsqrt(power + self.eps)).astype(self.dtype)
        return normed * spread(self.scale[...].astype(self.dtype), x.ndim)


class LayerNorm(nnx.Module):
    r"""$(x - \mu) / \sqrt{\sigma^2 + \epsilon} \cdot$ `scale` + `bias`, in float32."""

    def __init__(self, width: int, *, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*lead width"]) -> Float[Array, "*lead width"]:
        wide = x.astype(jnp.float32)
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        power = jnp.mean(centered * centered, axis=-1, keepdims=True)  # (..., 1)
        normed = centered * jax.lax.rsqrt(power + self.eps)
        scale = spread(self.scale[...].astype(jnp.float32), x.ndim)
        bias = spread(self.bias[...].astype(jnp.float32), x.ndim)
        return (normed * scale + bias).astype(self.dtype)
