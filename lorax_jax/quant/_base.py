"""`Base`: a frozen weight that is kept in another form than a dense array."""

import abc
from typing import Any

import jax

from ..structure import AxisOp, Bilinear, Scale, Unstructured, is_factor


class Base(abc.ABC):
    """A weight that answers for itself: quantized, compressed or otherwise packed.

    A dense array is the usual base and needs no wrapper. Any other form is one
    subclass, registered as a pytree whose arrays are all `Factor`s: transposing,
    slicing and scanning the weight then reach its pieces as they reach an adapter's.
    Nothing about shape is stored beside the arrays, for a scan takes an axis away.

    To add a form of base: subclass `Base` as a frozen dataclass registered as a
    pytree; implement `shape`, `dtype` and `dense`; override `consume` where the packed
    form has a product of its own, and `rescale` if it commutes with a product; list it
    in `tests/exam/bases.py`.
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
