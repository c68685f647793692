"""`count`: how much of a model an adapter trains."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from .adapters import Adapter, Fixed, stored


@dataclasses.dataclass(frozen=True)
class Count:
    """Numbers of values; printing it gives PEFT's line.

    >>> print(Count(294_912, 124_734_720))
    trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364
    """

    trainable: int
    total: int

    def __str__(self) -> str:
        return (
            f"trainable params: {self.trainable:,d} || all params: {self.total:,d} || "
            f"trainable%: {100 * self.trainable / self.total:.4f}"
        )


def count(params: Any, adapter: Adapter) -> Count:
    """Counts trainable values and all values, base and adapter together.

    Weights that several layers share count once, as PEFT counts them.
    Layers of a stack count at their true ranks. On types alone
    (`jax.eval_shape`), where ranks are not known, they count as padded.

    Args:
        params: the parameter tree, or its types.
        adapter: an adapter, or its types.

    Example:
        >>> import jax, jax.numpy as jnp, lorax_jax as lj
        >>> params = {"w": jnp.ones((30, 20))}
        >>> fn = lambda params, x: x @ params["w"]
        >>> plan = lj.plan(lj.LoraConfig("w", rank=2), params, fn, (jnp.ones(30),))
        >>> print(lj.count(params, lj.init(plan, params, key=jax.random.key(0))))
        trainable params: 100 || all params: 700 || trainable%: 14.2857
    """
    base, _ = stored(params)
    fixed = adapter.fixed.items()
    trainable = sum(_values(adapter.train[name], site) for name, site in fixed)
    # Factors that are kept as they were drawn are values too; starting factors, whose
    # product is subtracted again, are none of their own.
    kept = [({n: site[n] for n in ("a", "b") if n in site}, site) for _, site in fixed]
    frozen = sum(_values(*one) for one in kept)
    return Count(trainable, base + trainable + frozen)


def _values(arrays: dict[str, Any], fixed: Fixed) -> int:
    """How many values some arrays of a site hold, factors at their true ranks."""
    factors = [name for name in ("a", "b") if name in arrays]
    beside = sum(math.prod(x.shape) for n, x in arrays.items() if n not in factors)
    if not factors:
        return beside
    padded = _padded(arrays, fixed)
    per_rank = sum(math.prod(arrays[name].shape) for name in factors) // padded
    rank = fixed["rank"]
    if isinstance(rank, jax.ShapeDtypeStruct | Tracer):
        return per_rank * padded + beside
    layers = max(1, math.prod(rank.shape))
    ranks = np.asarray(rank)
    # A layer of a stack that is not adapted has vectors of its own, which never move.
    beside = beside // layers * int((ranks > 0).sum())
    return per_rank // layers * int(ranks.sum()) + beside


def _padded(arrays: dict[str, Any], fixed: Fixed) -> int:
    """The rank that the factors are padded to, whichever of them are there."""
    if "a" in arrays:
        return arrays["a"].shape[-1]
    return arrays["b"].shape[len(fixed.role.batch)]
