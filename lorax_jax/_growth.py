"""Growing a vocabulary: tables get rows for new tokens, the same ones every time."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from . import _paths
from ._errors import GrowthError, closest, listing, shorten

INITS = ("mean", "zeros", "normal")


class Table(NamedTuple):
    """A leaf that counts tokens.

    Attributes:
        path: its path.
        axis: its axis that does.
        ndim: how many axes it has.
    """

    path: str
    axis: int
    ndim: int


@dataclasses.dataclass(frozen=True)
class Growth:
    """How a vocabulary grew: enough to grow another copy of the parameters alike.

    Attributes:
        tables: the leaves that grew.
        before: how many tokens they counted.
        to: how many they were to count.
        multiple: what their size was then rounded up to a multiple of.
        init: how the new rows start; see `grow`.
        seed: of `init="normal"`.

    Example:
        >>> growth = Growth((Table("embed", 0, 2),), before=6, to=9, multiple=4)
        >>> growth.after, growth.token_rows
        (12, {'embed': (6, 7, 8)})
    """

    tables: tuple[Table, ...]
    before: int
    to: int
    multiple: int = 1
    init: str = "mean"
    seed: int = 0

    def __post_init__(self):
        for name, least in (("before", 0), ("to", 0), ("multiple", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise GrowthError(f"`{name}` = {value!r:.60}; an integer is meant.")
            if value < least:
                raise GrowthError(f"`{name}` = {value} must be at least {least}.")
            if value >= 1 << 31:
                raise GrowthError(f"`{name}` = {value} must be less than {1 << 31}.")
            object.__setattr__(self, name, int(value))
        if self.init not in INITS:
            raise GrowthError(
                f"`init` = {self.init!r}; one of {', '.join(INITS)} is meant."
            )
        if self.to < self.before:
            raise GrowthError(
                f"`to` = {self.to}, and the tables count {self.before} tokens already. "
                "A vocabulary grows and never shrinks: its rows are in use."
            )

    @property
    def after(self) -> int:
        """How many rows the tables have now: `to`, rounded up to `multiple`."""
        return -(-self.to // self.multiple) * self.multiple

    @property
    def token_rows(self) -> dict[str, tuple[int, ...]]:
        """The new tokens' rows, for `LoraConfig(token_rows=growth.token_rows)`.

        Of every table and head; a head's bias is a vector and has no rows. Rows that
        only round the size up belong to no token and are left out.
        """
        new = tuple(range(self.before, self.to))
        return {re.escape(t.path): new for t in self.tables if t.ndim > 1 and new}


def growth_of(
    params: Any,
    axes: Mapping[str, int],
    *,
    to: int,
    multiple: int = 1,
    init: str = "mean",
    seed: int = 0,
) -> Growth:
    """What growing these leaves to `to` tokens means; nothing is computed.

    Args:
        params: the parameter tree, or its types.
        axes: path -> the axis that counts tokens.
        to: how many tokens there shall be.
        multiple: round the size up to a multiple of it.
        init: how the new rows start.
        seed: of `init="normal"`.

    Raises:
        GrowthError: if a path or an axis is none of the tree, the leaves count
            different numbers, or are to shrink.
    """
    leaves = _leaves(params)
    if not axes:
        raise GrowthError("`tables` is empty. Name at least the table of tokens.")
    tables, sizes = [], {}
    for path, axis in axes.items():
        leaf = _leaf(leaves, path)
        ndim = len(leaf.shape)
        if (
            isinstance(axis, bool)
            or not isinstance(axis, int)
            or not (-ndim <= axis < ndim)
        ):
            raise GrowthError(
                f"`tables[{path!r}]` = {axis!r} is no axis of the leaf, whose shape is "
                f"{tuple(leaf.shape)}. Give the axis that counts tokens."
            )
        tables.append(Table(path, axis % ndim, ndim))
        sizes[path] = leaf.shape[axis]
    if len(set(sizes.values())) > 1:
        lines = [f"{path}: {size}" for path, size in sizes.items()]
        raise GrowthError(
            "The tables count different numbers of tokens along these axes.\n"
            + listing("found", lines)
            + "\nGive each the axis that counts tokens, or grow them one by one."
        )
    before = next(iter(sizes.values()))
    return Growth(tuple(tables), before, to, multiple, init, seed)


def enlarge(params: Any, growth: Growth) -> Any:
    """The tree with the tables grown; every other leaf is the same object.

    Args:
        params: the parameter tree, or its types.
        growth: from `growth_of`.

    Raises:
        GrowthError: if a table is not there, or not as it was.
    """
    pairs, treedef = _paths.flatten(params)
    leaves = _leaves(params)
    tables = {table.path: table for table in growth.tables}
    for path, table in tables.items():
        shape = tuple(_leaf(leaves, path).shape)
        if len(shape) != table.ndim or shape[table.axis] != growth.before:
            raise GrowthError(
                f"{path!r} has the shape {shape}; with {growth.before} tokens along "
                f"axis {table.axis} of {table.ndim} it could grow to {growth.after}. "
                "Give the parameters that the vocabulary grew from."
            )
    new = [
        grown_leaf(leaf, tables[path], growth) if path in tables else leaf
        for path, leaf in pairs
    ]
    return jax.tree.unflatten(treedef, new)


def grown_leaf(leaf: Any, table: Table, growth: Growth) -> Any:
    """One leaf with its new rows.

    Args:
        leaf: an array, or its type.
        table: which leaf it is, and the axis that counts tokens.
        growth: how it grows.

    Raises:
        GrowthError: if it does not hold floating numbers, or its sharding does not
            divide the new size.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise GrowthError(
            f"{table.path!r} has the dtype {leaf.dtype}, and new rows are means of "
            "floating numbers. Grow the table before it is quantized."
        )
    if growth.after == growth.before:
        return leaf
    shape = list(leaf.shape)
    shape[table.axis] = growth.after
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if sharding is not None:
        _check_divides(sharding, tuple(shape), table, growth)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype, sharding=sharding)

    def larger(leaf: jax.Array) -> jax.Array:
        rows = new_rows(leaf, table, growth)
        return jnp.concatenate([leaf, rows.astype(leaf.dtype)], table.axis)

    result = jax.jit(larger, out_shardings=sharding)(leaf)
    return np.asarray(result) if isinstance(leaf, np.ndarray) else result


def new_rows(leaf: jax.Array, table: Table, growth: Growth) -> jax.Array:
    """The rows that a leaf gets, in float32.

    Args:
        leaf: as it was.
        table: which leaf it is, and the axis that counts tokens.
        growth: how it grows.

    Returns:
        An array of the leaf's shape but for that axis.
    """
    axis, count = table.axis, growth.after - growth.before
    shape = leaf.shape[:axis] + (count,) + leaf.shape[axis + 1 :]
    if growth.init == "zeros":
        return jnp.zeros(shape, jnp.float32)
    wide = leaf.astype(jnp.float32)
    mean = jnp.broadcast_to(wide.mean(axis, keepdims=True), shape)
    if growth.init == "mean":
        return mean
    key = jax.random.fold_in(jax.random.key(growth.seed), _stable_hash(table.path))
    return mean + wide.std(axis, keepdims=True) * jax.random.normal(key, shape)


def _stable_hash(text: str) -> int:
    """32 bits of `text`, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _check_divides(
    sharding: Any, shape: tuple[int, ...], table: Table, growth: Growth
) -> None:
    try:
        sharding.shard_shape(shape)
    except ValueError:
        raise GrowthError(
            f"{table.path!r} is divided over devices as {sharding}, into which "
            f"{growth.after} rows do not go. Round the size up, e.g. with "
            "`multiple=64`."
        ) from None


def _leaves(params: Any) -> dict[str, Any]:
    return {
        path: leaf
        for path, leaf in _paths.flatten(params)[0]
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    }


def _leaf(leaves: Mapping[str, Any], path: str) -> Any:
    if path not in leaves:
        raise GrowthError(
            f"`tables` names {path!r}, which is no leaf of the parameters. Closest: "
            f"{shorten(closest(path, leaves))}."
        )
    return leaves[path]
