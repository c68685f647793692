"""Who may look at whom, and which attention kernel computes it."""

import re
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._cache import Cache

Backend = Literal["auto", "xla", "cudnn"]
BACKENDS: tuple[Backend, ...] = ("auto", "xla", "cudnn")


class Sight(NamedTuple):
    """Which keys each query sees: the same for all layers, worked out once.

    Attributes:
        mask: `(batch or 1, 1, queries or 1, keys)`, or None for all.
        causal: also hide keys after the query. With no mask, a flash kernel then skips
            half of the work and needs no mask in memory.
        window: also hide keys this many tokens or more before the query.
    """

    mask: Bool[Array, "rows 1 queries keys"] | None
    causal: bool
    window: int | None


def sight_without_cache(
    mask: Bool[Array, "batch seq"] | None, seq: int, window: int | None
) -> Sight:
    """Every token sees itself and the real tokens before it, `window` in all.

    Args:
        mask: true for real tokens; None says that all are.
        seq: the length of the sequence.
        window: the sliding window, or None.

    Returns:
        A `Sight` for `seq` queries over the same `seq` keys.
    """
    keys = None if mask is None else mask[:, None, None, :]  # (batch, 1, 1, seq)
    if window is not None and window >= seq:
        window = None
    return Sight(keys, causal=True, window=window)


def sight_into_cache(
    cache: Cache, valid: Bool[Array, "batch slots"], seq: int, window: int | None
) -> Sight:
    """The same over a cache's slots, for `seq` new tokens at `cache.length` onwards.

    Args:
        cache: as it was before the new tokens.
        valid: the cache's valid slots with the new tokens among them.
        seq: how many new tokens.
        window: the sliding window, or None. Distances are counted in slots, as
            Transformers counts them.

    Returns:
        A `Sight` for `seq` queries over all slots.
    """
    query = cache.length + jnp.arange(seq, dtype=jnp.int32)[:, None]  # (seq, 1)
    key = jnp.arange(cache.slots, dtype=jnp.int32)[None, :]  # (1, slots)
    seen = key <= query  # (seq, slots)
    if window is not None:
        seen = seen & (key > query - window)
    mask = seen[None, None] & valid[:, None, None, :]  # (batch, 1, seq, slots)
    return Sight(mask, causal=False, window=None)


def attend(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    sight: Sight,
    *,
    scale: float,
    backend: Backend,
) -> Float[Array, "batch queries heads head_dim"]:
    """Scaled dot-product attention; each key head serves `heads / kv_heads` queries.

    Args:
        query: rotated already.
        key: rotated already.
        value: as projected.
        sight: which keys each query sees.
        scale: what the products are multiplied by.
        backend: `"xla"`, `"cudnn"`, or `"auto"`: cuDNN's flash attention where it
            applies, XLA otherwise. (JAX's own default is always XLA.)

    Returns:
        The same shape and dtype as `query`.
    """
    if backend == "auto":
        backend = "cudnn" if _flash_applies(query, sight) else "xla"
    seq = query.shape[1]
    if backend == "cudnn" and sight.causal and seq % 2:
        # cuDNN's backward pass takes even lengths only. One more token at the end is
        # seen by no other, and its own output is cut off.
        query, key, value = (
            jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value)
        )
    dtype = query.dtype
    if dtype == jnp.float16 and jax.default_backend() == "cpu":
        # No CPU program sums products of float16 in float32, as the softmax wants them.
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    # JAX's own code asks what bfloat16 and float32 promote to, which the strict setting
    # refuses to say (JAX 0.12); nothing of ours is promoted here.
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=sight.mask,
            scale=scale,
            is_causal=sight.causal,
            local_window_size=None if sight.window is None else (sight.window - 1, 0),
            implementation=backend,
        )
    return (out if out.shape[1] == seq else out[:, :seq]).astype(dtype)


def _flash_applies(
    query: Float[Array, "batch queries heads head_dim"], sight: Sight
) -> bool:
    """Whether cuDNN's flash attention takes this: half precision, no mask.

    An odd length only where attention is causal; see `attend`.

    Decided while tracing, from the default backend. `jax.lax.platform_dependent` would
    decide later, but differentiates into residuals of both branches, and XLA's are the
    (queries, keys) matrices that flash attention exists to avoid.
    """
    if sight.mask is not None or query.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    if query.shape[1] % 2 and not sight.causal:
        return False
    head_dim = query.shape[-1]
    if head_dim % 8 or head_dim > 128:
        return False
    return _has_cudnn()


def _has_cudnn() -> bool:
    if jax.default_backend() != "gpu":
        return False
    # "8.0" and up on NVIDIA; AMD reports names such as "gfx942", which do not match.
    found = re.fullmatch(
        r"(\d+)\.\d+", str(getattr(jax.devices()[0], "compute_capability", ""))
    )
    return found is not None and int(found.group(1)) >= 8


def new_positions(
    mask: Bool[Array, "batch seq"] | None,
    start: Int[Array, "batch"] | None,
    seq: int,
) -> Int[Array, "rows seq"]:
    """Positions that count real tokens only, so padding on the left changes nothing.

    Args:
        mask: true for real tokens; None says that all are.
        start: the position of each row's first new token; None says 0.
        seq: how many new tokens.

    Returns:
        `(batch, seq)`, or `(1, seq)` where all rows agree.

    Example:
        >>> new_positions(jnp.array([[False, True, True]]), None, 3).tolist()
        [[0, 0, 1]]
    """
    if mask is None:
        positions = jnp.arange(seq, dtype=jnp.int32)[None, :]  # (1, seq)
    else:
        counted = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
        positions = jnp.maximum(counted - 1, 0)  # (batch, seq)
    return positions if start is None else positions + start[:, None]
