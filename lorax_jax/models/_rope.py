"""Rotary position embeddings: the frequencies, the tables and the rotation."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._errors import ConfigError
from ._numbers import check_numbers

Tables = tuple[Float[Array, "rows seq 1 half"], Float[Array, "rows seq 1 half"]]


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn into angles.

    `kind` is Hugging Face's `rope_type`: `"default"`, `"linear"` (all frequencies
    divided by `factor`) or `"llama3"` (low frequencies divided by `factor`, high ones
    kept, those between blended).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_length: int = 0


# Per kind: the keys that `rope_parameters` may hold.
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}


def rope_from_hf(parameters: Mapping[str, Any]) -> Rope:
    """Reads `rope_parameters` (Transformers 5's form of `rope_scaling`).

    Args:
        parameters: with `rope_theta`, `rope_type` and what the type needs.

    Returns:
        The same as a hashable `Rope`.

    Raises:
        ConfigError: for a `rope_type` that is not here, a key that its type does not
            use, or one that it lacks.

    Example:
        >>> rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
        >>> rope_from_hf(rope).factor
        2.0
    """
    kind = parameters.get("rope_type", "default")
    if kind not in _KEYS:
        raise ConfigError(
            f"`rope_parameters` has rope_type = {kind!r}; the types here are "
            f"{', '.join(sorted(_KEYS))}."
        )
    known = _KEYS[kind] | {"rope_theta", "rope_type", "type"}
    if parameters.get("partial_rotary_factor", 1.0) == 1.0:
        known = known | {"partial_rotary_factor"}
    unknown = {
        key: value
        for key, value in parameters.items()
        if key not in known and value is not None
    }
    if unknown:
        raise ConfigError(
            f"`rope_parameters` of type {kind!r} holds {unknown}, which is not "
            f"implemented for that type; it may hold {sorted(known)}."
        )
    missing = sorted((_KEYS[kind] | {"rope_theta"}) - parameters.keys())
    if missing:
        raise ConfigError(f"`rope_parameters` of type {kind!r} lacks {missing}.")
    check_numbers(parameters)
    low = parameters.get("low_freq_factor", 0.0)
    high = parameters.get("high_freq_factor", 1.0)
    if not low < high:
        raise ConfigError(
            f"`low_freq_factor` = {low} is not below `high_freq_factor` = {high}."
        )
    return Rope(
        theta=float(parameters["rope_theta"]),
        kind=kind,
        factor=float(parameters.get("factor", 1.0)),
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 1.0)),
        original_length=int(parameters.get("original_max_position_embeddings", 0)),
    )


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    r"""The angle per position of each pair of a head's coordinates.

    $$f_j = \theta^{-2j/d}, \qquad j = 0 \ldots d/2 - 1,$$

    divided by `factor` for `linear`. For `llama3`, with wavelength
    $\lambda_j = 2\pi/f_j$ and $L$ = `original_length`: divided by `factor` where
    $L/\lambda_j$ < `low_freq_factor`, kept where it is above `high_freq_factor`, and
    blended linearly in $L/\lambda_j$ between the two.

    Args:
        rope: kind and constants.
        head_dim: $d$.

    Returns:
        float32, shape `(head_dim // 2,)`; a constant of the model, not an array on a
        device.

    Example:
        >>> frequencies(Rope(theta=100.0), head_dim=4).round(3).tolist()
        [1.0, 0.10000000149011612]

    References:
        Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding",
        2021. https://arxiv.org/abs/2104.09864
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.kind == "default":
        return plain
    slow = plain / np.float32(rope.factor)
    if rope.kind == "linear":
        return slow
    turns = rope.original_length * plain / (2 * math.pi)  # L / wavelength
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - keep) * slow + keep * plain).astype(np.float32)


def rope_tables(
    rope: Rope,
    positions: Int[Array, "rows seq"],
    head_dim: int,
    dtype: jnp.dtype,
) -> Tables:
    """Cosines and sines for every position, computed once per forward pass.

    Angles, cosines and sines are float32; the result is cast to the model's dtype, as
    Transformers does.

    Args:
        rope: kind and constants.
        positions: one row for all examples, `(1, seq)`, or one each, `(batch, seq)`.
        head_dim: the width of a head.
        dtype: of the result.

    Returns:
        `(cos, sin)`, each `(rows, seq, 1, head_dim // 2)`: the 1 is for the heads.
    """
    angles = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(
        frequencies(rope, head_dim)[None, None, None, :]
    )  # (rows, seq, 1, half)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(
    x: Float[Array, "batch seq heads head_dim"], tables: Tables
) -> Float[Array, "batch seq heads head_dim"]:
    """Turns each pair `(x[j], x[j + head_dim // 2])` by its angle.

    Args:
        x: queries or keys.
        tables: from `rope_tables`.

    Returns:
        The same shape and dtype.
    """
    cos, sin = tables
    first, second = jnp.split(x, 2, axis=-1)  # (batch, seq, heads, half)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
