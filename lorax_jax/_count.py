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

    Factors that are frozen, such as MiCA's B, count among all values; starting factors
    of the weight do not: like scales and norms they are no weights of the model.
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
    trainable = frozen = 0
    for name, fixed in adapter.fixed.items():
        kept = {n: fixed[n] for n in ("a", "b") if n in fixed}
        trainable += _values(adapter.train[name], fixed)
        frozen += _values(kept, fixed)
    return Count(trainable, base + trainable + frozen)


def _values(arrays: dict[str, Any], fixed: Fixed) -> int:
    beside = sum(math.prod(x.shape) for n, x in arrays.items() if n not in ("a", "b"))
    factors = [arrays[name] for name in ("a", "b") if name in arrays]
    if not factors:
        return beside
    padded = _padded(arrays, fixed)
    per_rank = sum(math.prod(factor.shape) for factor in factors) // padded
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
