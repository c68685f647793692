"""`Base`: a frozen weight that is kept in another form than a dense array."""

import abc
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..structure import AxisOp, Bilinear, Scale, Unstructured, is_factor


class Base(abc.ABC):
    """A weight that answers for itself: quantized, compressed or otherwise packed.

    A dense array is the usual base and needs no wrapper. Any other form is one
    subclass, registered as a pytree whose arrays are all `Factor`s: transposing,
    slicing and scanning the weight then reach its pieces as they reach an adapter's.
    Nothing about shape is stored beside the arrays, for a scan takes an axis away.

    To add a form of base: subclass `Base` as a frozen dataclass registered as a
    pytree; implement `shape`, `dtype` and `dense`; override `consume` where the packed
    form has a product of its own, `rescale` if it commutes with a product, and what
    else the defaults would get wrong; list it in `tests/exam/bases.py`.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """Floating dtype of the dense weight, as the model sees it."""

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """W as a dense array: for merging, and on request."""

    @property
    def size(self) -> int:
        """How many values it holds; those that it repeats count once."""
        return math.prod(self.shape)

    def opened(self) -> "Base | jax.Array":
        """The base for an operation that it cannot follow: itself, or dense.

        Dense where that makes nothing that the model would not make of a dense weight.
        """
        return self

    def merged(self) -> "Base | jax.Array":
        """What stands for it in merged parameters where nothing adapts it."""
        return self

    def looks_up(self, axis: int) -> bool:
        """Whether a gather along `axis` consumes it, rather than choosing a part."""
        del axis
        return True

    def squares(self, axes: Sequence[int]) -> jax.Array:
        """Sums of squares over some axes, in float32; those axes stay, of size 1."""
        dense = self.dense().astype(jnp.float32)
        return jnp.square(dense).sum(tuple(axes), keepdims=True)

    def overwritten(self, axis: int, at: jax.Array, values: jax.Array) -> "Base":
        """The base with `values` in place of its entries `at` along `axis`."""
        del axis, at, values
        raise Unstructured(f"{type(self).__name__} cannot be written into")

    def consume(self, x: jax.Array, op: Bilinear) -> jax.Array:
        """`op(x, W)`, with the dense operation's dtype.

        Unpacks the weight where it is used, which XLA fuses into the operation where
        it can. Override it where the packed form can do better.
        """
        return op.dense(x, self.dense())

    def rescale(self, op: Scale) -> "Base":
        """The base multiplied by a scalar or vector."""
        raise Unstructured(f"{type(self).__name__} does not commute with a product")

    def cast(self, dtype: Any) -> "Base":
        """The base, seen by the model in another floating dtype."""
        raise Unstructured(f"{type(self).__name__} cannot change its dtype to {dtype}")

    def apply(self, op: AxisOp) -> "Base":
        """The base that a structure-only operation makes of this one."""
        if isinstance(op, Scale):
            return self.rescale(op)
        return jax.tree.map(lambda f: f.apply(op), self, is_leaf=is_factor)
