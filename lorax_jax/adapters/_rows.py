"""Token rows: chosen rows of a table, trained in place of the base's."""

import dataclasses

import jax
import jax.numpy as jnp

from .._errors import AdapterError
from ..structure import (
    Along,
    AxisOp,
    Bilinear,
    Broadcast,
    Factor,
    Group,
    Pick,
    Reshape,
    Scale,
    Take,
    Unstructured,
    arrange,
)
from ._base import Inner, Term
from ._kind import Site, kind
from ._shapes import check_weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows(Term):
    r"""Replaces some rows of a table by trained ones.

    $$W'_i = r_j \text{ where } i = \mathrm{ids}_j, \text{ else } W_i$$

    A lookup gives the trained row where an index is one of `ids`; a product over the
    width, as in a tied head, has its outputs for these rows replaced. The table itself
    is never copied.

    Attributes:
        rows: the trained rows; its first axis takes the place of the table's rows, and
            has their label.
        ids: which rows they are, ascending, without axes of the weight.
    """

    rows: Factor
    ids: Factor

    @property
    def axis(self) -> int:
        """The weight's axis that counts rows."""
        axis = self.rows.axes[0]
        assert isinstance(axis, int)
        return axis

    def act(self, x: jax.Array, op: Bilinear, inner: Inner) -> jax.Array:
        ids = self.ids.array
        if isinstance(op, Take):
            return self._looked_up(x, op, inner(x))
        rows = self._as_weight(len(self.rows.axes))
        if self.axis in op.out_labels:
            at = op.out_labels.index(self.axis)
            y, new = inner(x), op.dense(x, rows.astype(x.dtype))
            return y.at[(slice(None),) * at + (ids,)].set(new.astype(y.dtype))
        # The rows are summed over, as in a product with one-hot vectors.
        at = op.x_labels.index(self.axis)
        index = (slice(None),) * at + (ids,)
        y = inner(x.at[index].set(0))
        return y + op.dense(x[index], rows.astype(x.dtype)).astype(y.dtype)

    def _looked_up(self, x: jax.Array, op: Take, y: jax.Array) -> jax.Array:
        if op.axis != self.axis:
            raise Unstructured("a table with trained rows is indexed along its width")
        ids, found = self.ids.array, x[..., 0]
        at = jnp.minimum(jnp.searchsorted(ids, found), ids.shape[0] - 1)
        labels = op.row_labels(x, self.rows.axes)
        rows = arrange(self.rows.array[at], labels, op.out_labels, y.shape)
        trained = arrange(
            ids[at] == found, labels[: found.ndim], op.out_labels, y.shape
        )
        return jnp.where(trained, rows.astype(y.dtype), y)

    def dense(self, weight: jax.Array) -> jax.Array:
        rows = self._as_weight(weight.ndim).astype(weight.dtype)
        return weight.at[(slice(None),) * self.axis + (self.ids.array,)].set(rows)

    def looks_up(self, axis: int) -> bool:
        return axis == self.axis

    def apply(self, op: AxisOp) -> "Rows":
        match op:
            case Along(axis) if axis == self.axis:
                raise Unstructured("a part of a table with trained rows is taken")
            case Pick():
                return self._picked(op)
            case Broadcast():
                raise Unstructured("a table with trained rows is broadcast")
            case Scale(map, values, axes):
                return self._rescaled(map, values, axes)
            case Reshape(groups):
                op = Reshape(tuple(self._with_count(group) for group in groups))
        return Rows(self.rows.apply(op), self.ids)

    def _picked(self, op: Pick) -> "Rows":
        if self.axis in op.axes:
            raise Unstructured("a part of a table with trained rows is taken")
        if op.fills:
            raise Unstructured("columns of a table with trained rows are filled in")
        rows = self.rows.apply(op)
        there = Factor(jnp.ones_like(self.rows.array), self.rows.axes).apply(op)
        # Where the indices are out of range, the table has no number either.
        array = jnp.where(there.array == 0, jnp.nan, rows.array)
        axis = dict(op.kept)[self.axis]
        axes = (axis, *(x for x in rows.axes if x != axis))
        return Rows(Factor(Factor(array, rows.axes).aligned(axes), axes), self.ids)

    def _with_count(self, group: Group) -> Group:
        """A reshape's group, with the number of trained rows for that of the table."""
        if self.axis not in group.old:
            return group
        if len(group.old) > 1 or len(group.new) > 1:
            raise Unstructured("the rows of a table with trained rows are regrouped")
        return Group(group.old, group.new, (self.rows.array.shape[0],))

    def _rescaled(self, map, values, axes) -> "Rows":
        if values is None or self.axis in axes:
            raise Unstructured("the rows of a table are scaled one by one")
        factor = Factor(values, axes).aligned(self.rows.axes)
        return Rows(Factor(map(self.rows.array, factor), self.rows.axes), self.ids)

    def _as_weight(self, ndim: int) -> jax.Array:
        """The rows with the weight's axes, in the weight's order."""
        if len(self.rows.axes) != ndim:
            raise Unstructured("a table with trained rows has got more axes")
        return self.rows.aligned(tuple(range(ndim)))


@kind("rows", train=("rows",), fixed=("ids",))
def bind_rows(site: Site):
    """The table with some rows replaced."""
    site.refuse_weight("trained rows")
    role, base, rows = site.role, site.base, site.train["rows"]
    check_weight(base, role)
    if any(isinstance(term, Rows) for term in getattr(base, "terms", ())):
        raise AdapterError(
            f"Two adapters train rows of {role.path!r}, and each would replace the "
            "other's. Bind one of them."
        )
    wanted = (jnp.shape(site.fixed["ids"])[0], *role.sizes(base.shape, role.outputs))
    if jnp.shape(rows) != wanted:
        raise AdapterError(
            f"The adapter holds rows of {role.path!r} of shape {jnp.shape(rows)}; the "
            f"parameters need {wanted}. Bind it to the parameters that it was planned "
            "on."
        )
    return site.with_term(
        Rows(
            Factor(rows, (*role.inputs, *role.outputs)),
            Factor(site.fixed["ids"], ("id",)),
        )
    )
