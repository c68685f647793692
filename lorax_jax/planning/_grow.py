"""`grow`: parameters with rows for new tokens."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .. import _paths
from .._errors import GrowthError
from .._growth import Growth, enlarge, growth_of
from ..adapters import Adapted, is_weight
from ..transform import read
from ._token_axis import token_axis


def grow(
    params: Any,
    tables: Growth | Mapping[str, int | None] | Iterable[str] | str,
    *,
    to: int | None = None,
    multiple: int = 1,
    init: str = "mean",
    seed: int = 0,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, Growth]:
    r"""Gives the tables of tokens more rows, and tells how.

    New rows start at the mean of the old ones,

    $$W_i = \frac{1}{V} \sum_{j < V} W_j \quad\text{for } i \ge V,$$

    taken in float32: a new token then begins as an average one, and at an output head
    its logit is the average logit. Transformers' `resize_token_embeddings` starts there
    too, and adds a tiny noise.

    Train the new rows with `LoraConfig(token_rows=growth.token_rows)`, and give
    `growth` to `save_adapter`: the adapter's file then holds these rows alone, and
    tells how the tables grew.

    Args:
        params: the parameter tree, or its types.
        tables: which leaves count tokens, and along which axis: a dict from paths to
            axes. The axis of a vector, such as a head's bias, is known; that of other
            leaves is read off `fn` where it is not given (`None`, or paths alone). Do
            not forget an untied head. A `Growth` repeats an earlier growth.
        to: how many tokens there shall be: `len(tokenizer)`.
        multiple: round the number of rows up to a multiple of it.
        init: `"mean"`, `"zeros"`, or `"normal"`: around the mean, with the standard
            deviation of each column.
        seed: of `"normal"`.
        fn: the model, any function whose first argument is the parameter tree; asked
            for axes that are not given.
        args: its other positional arguments, or their types.
        kwargs: its keyword arguments.

    Returns:
        `(params, growth)`: a new tree, in which all leaves but the tables are the same
        objects, and a `Growth`.

    Raises:
        GrowthError: if a path is no leaf, an axis is not known, the tables count
            different numbers of tokens or more than `to`.

    Example:
        >>> import jax.numpy as jnp, lorax_jax as lj
        >>> params = {"embed": jnp.ones((6, 2)), "head": jnp.ones((2, 6))}
        >>> params, growth = lj.grow(params, {"embed": 0, "head": 1}, to=8)
        >>> params["embed"].shape, params["head"].shape
        ((8, 2), (2, 8))
        >>> growth.token_rows
        {'embed': (6, 7), 'head': (6, 7)}
    """
    bound = [path for path, leaf in _flat(params) if isinstance(leaf, Adapted)]
    if bound:
        raise GrowthError(
            f"{bound[0]!r} is adapted: the tree comes from `bind`. Grow the parameters "
            "first, and plan the adapter on those."
        )
    if isinstance(tables, Growth):
        if to is not None:
            raise GrowthError(
                f"`tables` is a `Growth`, which says how far, and `to` = {to} is given "
                "too. Leave one of the two out."
            )
        return enlarge(params, tables), tables
    if to is None:
        raise GrowthError("`to` is missing: how many tokens shall there be?")
    asked = _asked(tables)
    axes = _axes(asked, params, fn, args, kwargs or {})
    growth = growth_of(params, axes, to=to, multiple=multiple, init=init, seed=seed)
    return enlarge(params, growth), growth


def _asked(tables: Any) -> dict[str, int | None]:
    tables = [tables] if isinstance(tables, str) else tables
    listed = tables if isinstance(tables, Iterable) else [tables]
    asked = dict(tables) if isinstance(tables, Mapping) else dict.fromkeys(listed)
    for path, axis in asked.items():
        fine = axis is None or (isinstance(axis, int) and not isinstance(axis, bool))
        if not isinstance(path, str) or not fine:
            raise GrowthError(
                f"`tables` has {path!r:.60}: {axis!r:.60}; paths of leaves are meant, "
                "or a dict from paths to axes, as in {'embed': 0, 'head': 1}."
            )
    return asked


def _axes(
    asked: Mapping[str, int | None],
    params: Any,
    fn: Callable[..., Any] | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[str, int]:
    """The axes as given, or as the function uses the leaves."""
    shapes = {
        p: tuple(leaf.shape) for p, leaf in _flat(params) if hasattr(leaf, "shape")
    }
    open_ = [p for p, axis in asked.items() if axis is None and p in shapes]
    found: dict[str, int | None] = {p: 0 for p in open_ if len(shapes[p]) == 1}
    if fn is not None and len(found) < len(open_):
        leaves = read(fn, params, args, kwargs).leaves
        found = {p: token_axis(leaves[p], stacked=True) for p in open_} | found
    axes = {}
    for path, axis in asked.items():
        axis = found.get(path) if axis is None else axis
        if axis is None and path in shapes:
            why = "`fn` neither looks it up along one axis nor makes outputs along one"
            raise GrowthError(
                f"Which axis of {path!r}, of shape {shapes[path]}, counts tokens is "
                f"not known: {'no axis is given' if fn is None else why}. Say it: "
                f"tables={{{path!r}: 0}}, say; or give `fn` and `args`."
            )
        axes[path] = 0 if axis is None else axis  # an unknown path is refused later
    return axes


def _flat(params: Any) -> list[tuple[str, Any]]:
    return _paths.flatten(params, is_leaf=is_weight)[0]
