"""`replicate`: a deeper model whose layers share the weights of a shallower one."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _paths
from .._errors import ReplicationError, closest, listing
from .._ranges import checked_ranges, sources
from ..quant import Base
from ..structure import Factor
from ._view import LAYER, Replicated

_WHAT = "`ranges`"


def replicate(
    params: Any, ranges: Any, *, layers: str = "layers", axis: int = 0
) -> Any:
    r"""Repeats layers of a model without copying them.

    The new model's layers are the ranges, one behind the other: with
    `((0, 4), (2, 6))` the layers 0, 1, 2, 3, 2, 3, 4, 5 of the old one. Nothing is
    copied. Where layers are unrolled, the new ones hold the same arrays; where they are
    stacked, each leaf becomes a `Replicated`, the stack as it is with an index. An
    adapter planned on the result has factors of its own for each copy.

    The model must be told how many layers it has now: for those of `lorax_jax.models`
    it is `model.with_layers(n)`. A tree with stacked layers needs `adapt`, with an
    adapter or without; an unrolled one does not.

    Merging builds the copies, for after it they differ: memory grows with them.

    Args:
        params: the parameter tree, or its types; untouched. All that is not below
            `layers` is in the result as it is.
        ranges: pairs `(first, end)` of layers, the end not included: PEFT's
            `layer_replication`.
        layers: the path of the layers. A list, a tuple or a dictionary with the keys
            0, 1, ... holds unrolled ones; anything else is a tree of stacked leaves.
            Where numbers are parts of keys, `{i}` stands for them: `"params/h_{i}"`.
        axis: of stacked leaves, the axis that counts layers.

    Returns:
        A new tree.

    Raises:
        ConfigError: if `ranges` are none, or go beyond the layers.
        ReplicationError: if `layers` leads nowhere, or to no layers.

    Example:
        >>> import lorax_jax as lj
        >>> params = {"layers": [{"w": jnp.ones((2, 2))}, {"w": jnp.zeros((2, 2))}]}
        >>> deeper = lj.replicate(params, ((0, 2), (1, 2)))
        >>> len(deeper["layers"]), deeper["layers"][2]["w"] is params["layers"][1]["w"]
        (3, True)
        >>> params = {"layers": {"w": jnp.ones((2, 3, 3))}}
        >>> lj.replicate(params, ((0, 2), (1, 2)))["layers"]["w"].shape
        (3, 3, 3)
    """
    ranges = checked_ranges(ranges, _WHAT)
    if not isinstance(layers, str) or not hasattr(axis, "__index__"):
        raise ReplicationError(
            f"`layers` = {layers!r:.60} and `axis` = {axis!r:.60}; the path of the "
            "layers and an integer are meant, as in layers='model/layers', axis=0."
        )
    above, _, last = layers.rpartition("/")
    before, numbered, after = last.partition("{i}")

    def container(node: Any) -> Any:
        if numbered:
            return _renumbered(node, ranges, layers, before, after)
        if isinstance(node, list | tuple):
            chosen = [node[i] for i in sources(ranges, len(node), _WHAT)]
            return type(node)(chosen)
        if isinstance(node, Mapping) and _numbers(node, "", ""):
            return _renumbered(node, ranges, layers, "", "")
        return _stacked(node, ranges, layers, axis)

    return _replaced(params, above if numbered else layers, container, layers, params)


def _replaced(
    node: Any, path: str, change: Callable[[Any], Any], layers: str, params: Any
) -> Any:
    """`node` with what is at `path` changed; everything else is the same object."""
    if not path:
        return change(node)
    first, _, rest = path.partition("/")
    keyed, tree = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda below: below is not node
    )
    children = [child for _, child in keyed]
    names = [_paths.path_string(key) for key, _ in keyed]
    if first not in names:
        raise ReplicationError(_nowhere(layers, params))
    at = names.index(first)
    children[at] = _replaced(children[at], rest, change, layers, params)
    return jax.tree.unflatten(tree, children)


def _nowhere(layers: str, params: Any) -> str:
    paths = [path for path, _ in _paths.flatten(params)[0]]
    parts = [path.split("/") for path in paths]
    above = {"/".join(p[:i]) for p in parts for i in range(1, len(p))}
    return (
        f"`layers` = {layers!r} leads to no layers of the parameters.\n"
        + listing("closest", closest(layers, sorted(above)), len(above))
        + "\nGive the path of the container: replicate(params, ranges, layers='...')"
    )


def _numbers(node: Mapping[Any, Any], before: str, after: str) -> dict[int, Any]:
    """Keys by the number in them; empty if these are not 0, 1, 2 and so on."""
    pattern = re.compile(rf"{re.escape(before)}(0|[1-9]\d*){re.escape(after)}")
    found = {}
    for key in node:
        match = pattern.fullmatch(str(key))
        if match:
            found[int(match[1])] = key
    whole = sorted(found) == list(range(len(found)))
    alone = bool(before or after) or len(found) == len(node)
    return found if whole and alone else {}


def _renumbered(
    node: Any, ranges: Any, layers: str, before: str, after: str
) -> Mapping[Any, Any]:
    keys = _numbers(node, before, after) if isinstance(node, Mapping) else {}
    if not keys:
        shown = sorted(map(str, node))[:8] if isinstance(node, Mapping) else type(node)
        raise ReplicationError(
            f"`layers` = {layers!r} leads to no dictionary with the keys "
            f"{before}0{after}, {before}1{after} and so on: found {shown}."
        )
    kind = type(keys[0])  # an integer or a string
    new = {key: value for key, value in node.items() if key not in set(keys.values())}
    for i, source in enumerate(sources(ranges, len(keys), _WHAT)):
        new[i if kind is int else f"{before}{i}{after}"] = node[keys[source]]
    return type(node)(new)  # pyright: ignore  (a mapping that takes a dictionary)


def _stacked(node: Any, ranges: Any, layers: str, axis: int) -> Any:
    leaves, tree = _paths.flatten(node, is_leaf=lambda x: isinstance(x, Base))
    counts: dict[int, str] = {}
    for path, leaf in leaves:
        where = f"{layers}/{path}"
        if isinstance(leaf, Base):
            how = "replicated before" if isinstance(leaf, Replicated) else "packed"
            raise ReplicationError(
                f"{where!r} is {how}, and an index into it is not known. Replicate "
                "plain stacks, or unrolled layers, which may be packed."
            )
        if not hasattr(leaf, "shape"):
            continue
        if not -len(leaf.shape) <= axis < len(leaf.shape):
            raise ReplicationError(
                f"{where!r} of shape {tuple(leaf.shape)} has no axis {axis} that could "
                "count layers. Say which one does, `axis=...`, or give the path of "
                "the stacked leaves alone, `layers='...'`."
            )
        counts.setdefault(leaf.shape[axis], where)
    if len(counts) != 1:
        shown = [f"{where!r} has {n}" for n, where in counts.items()]
        raise ReplicationError(
            f"`layers` = {layers!r} leads to no stack of layers along axis {axis}: "
            f"{'; '.join(shown) or 'there are no arrays'}. All leaves of a stack have "
            "as many layers."
        )
    (count,) = counts
    index = jnp.asarray(np.array(sources(ranges, count, _WHAT), np.int32))

    def view(leaf: Any) -> Any:
        if not hasattr(leaf, "shape"):
            return leaf
        at = axis % len(leaf.shape)
        axes = tuple(LAYER if i == at else i for i in range(len(leaf.shape)))
        return Replicated(Factor(leaf, axes), Factor(index, (at,)))

    return jax.tree.unflatten(tree, [view(leaf) for _, leaf in leaves])
