"""`Adapted`: a weight that is a base and an ordered list of terms."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from .._errors import TransformError
from ..quant import Base
from ..structure import (
    AxisOp,
    Bilinear,
    Cast,
    Factor,
    Unstructured,
    Use,
    is_factor,
    wide,
)
from ._base import Term


@dataclasses.dataclass(frozen=True)
class Origin:
    """The path of a weight, for messages alone.

    It travels in the static part of a pytree, but two labels are always equal: layers
    that differ in nothing else then share one trace.
    """

    path: str = dataclasses.field(default="", compare=False)


@jax.tree_util.register_pytree_with_keys_class
class Adapted:
    """A base weight with the terms that adapters add to it.

    It stands where the dense weight stood in the parameter tree, and inside an adapted
    function it goes through transposes, reshapes, slices and control flow unbuilt,
    until a product consumes it.

    Args:
        base: the frozen weight: a dense array or a `Base`.
        terms: what acts on it, first to last.
        origin: the weight's path.
    """

    __slots__ = ("base", "origin", "terms")

    def __init__(
        self, base: jax.Array | Base, terms: tuple[Term, ...], origin: Origin = Origin()
    ):
        self.base = base
        self.terms = terms
        self.origin = origin

    def tree_flatten_with_keys(self):
        keys = jax.tree_util.GetAttrKey("base"), jax.tree_util.GetAttrKey("terms")
        return tuple(zip(keys, (self.base, self.terms), strict=True)), self.origin

    def tree_flatten(self):
        return (self.base, self.terms), self.origin

    @classmethod
    def tree_unflatten(cls, origin, children):
        base, terms = children
        return cls(base, terms, origin)

    def __repr__(self):
        names = ", ".join(type(term).__name__ for term in self.terms)
        return f"Adapted({self.origin.path!r}, base={self.base!r}, terms=[{names}])"

    def __jax_array__(self):
        raise TransformError(
            f"The adapted weight {self.origin.path!r} is used in a plain function. "
            "Call the function through `lj.adapt(fn)`, or build the weights with "
            "`lj.merge`."
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the dense weight."""
        return len(self.base.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the dense weight."""
        return self.base.dtype

    @property
    def is_packed(self) -> bool:
        """Whether the base is a `Base`, which answers for itself."""
        return isinstance(self.base, Base)

    def acting(self, use: Use) -> tuple[Term, ...]:
        """The terms that take part in this use of the weight."""
        return tuple(term for term in self.terms if term.acts_in(use))

    def looks_up(self, axis: int) -> bool:
        """Whether a gather along `axis` consumes the weight rather than a part of it.

        Of a weight without terms, a `Base` that nothing adapts, the base says so.
        """
        if not self.terms:
            return not isinstance(self.base, Base) or self.base.looks_up(axis)
        return any(term.looks_up(axis) for term in self.terms)

    def opened(self) -> "Adapted | Base | jax.Array":
        """The weight for an operation that its base cannot follow: see `Base.opened`.

        A dense array where nothing adapts it.
        """
        if not isinstance(self.base, Base):
            return self
        base = self.base.opened()
        if base is self.base:
            return self
        return Adapted(base, self.terms, self.origin) if self.terms else base

    def apply(self, base: Any, *ops: AxisOp) -> "Adapted":
        """The weight after structure-only operations.

        Args:
            base: what the operations made of a dense base; `None` for a `Base`, which
                applies them itself.
            ops: the operations, in order, for the terms.
        """
        if isinstance(self.base, Base):
            base = self.base
            for op in ops:
                base = base.cast(op.dtype) if isinstance(op, Cast) else base.apply(op)
        terms = self.terms
        for op in ops:
            terms = tuple(term.apply(op) for term in terms)
        return Adapted(base, terms, self.origin)

    def consume(
        self, x: jax.Array, op: Bilinear, product: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """`op(x, W)` for the adapted weight.

        Args:
            x: the other operand.
            op: the operation.
            product: what the model does with a dense base: `x -> op(x, W)`. A `Base`
                answers for itself.
        """
        if isinstance(self.base, Base):
            product = functools.partial(self.base.consume, op=op)
        for term in self.acting(op.use):
            product = functools.partial(term.act, op=op, inner=product)
        return product(x)

    def dense(self) -> jax.Array:
        """The adapted weight as one array of its dtype, rounded once."""
        base = self.base.dense() if isinstance(self.base, Base) else self.base
        if not self.terms:
            return base
        if any(term.use for term in self.terms):
            raise Unstructured(
                "the adapter acts in one use of a tied weight only, so no single "
                "matrix does what it does"
            )
        weight = base.astype(wide(base.dtype))
        for term in self.terms:
            weight = term.dense(weight)
        return weight.astype(base.dtype)

    def parts(self) -> list[Factor]:
        """Every array of base and terms as a `Factor`, in pytree order.

        A dense base counts as one that holds all axes.
        """
        if isinstance(self.base, Base):
            return jax.tree.leaves(self, is_leaf=is_factor)
        whole = Factor(self.base, tuple(range(self.ndim)))
        return [whole, *jax.tree.leaves(self.terms, is_leaf=is_factor)]

    def rebuild(self, parts: list[Factor]) -> "Adapted":
        """The weight with `parts` in place of its own."""
        if isinstance(self.base, Base):
            structure = jax.tree.structure(self, is_leaf=is_factor)
            return jax.tree.unflatten(structure, parts)
        structure = jax.tree.structure(self.terms, is_leaf=is_factor)
        terms = jax.tree.unflatten(structure, parts[1:])
        return Adapted(parts[0].array, terms, self.origin)


def is_weight(node: Any) -> bool:
    """Whether `node` is a weight that the transform evaluates symbolically."""
    return isinstance(node, Adapted | Base)
