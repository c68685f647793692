"""`bind`: how adapters meet the parameters."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import _paths
from .._errors import AdapterError, closest, listing
from ._adapted import Adapted, is_weight
from ._kind import KINDS, Site
from ._random import as_key
from ._role import Adapter, Fixed, Role


def bind(
    params: Any,
    *adapters: Adapter,
    weights: Sequence[Any] | None = None,
    key: jax.Array | None = None,
) -> Any:
    r"""Puts adapted weights where the dense ones were.

    The result has the structure of `params`, with an `Adapted` node at each adapted
    weight, and stands for

    $$W + \sum_i w_i\,s_i\,A_i B_i .$$

    Nothing is computed and the base is not copied: its leaves are the same arrays.

    Args:
        params: the parameter tree; untouched.
        adapters: adapters to apply, in order.
        weights: one multiplier for each adapter; `None` is 1 for all.
        key: PRNG key for dropout; `None` turns dropout off.

    Returns:
        A tree for functions that went through `adapt`. It is a pytree: it may be
        passed into `jit`, mapped over and donated against, but bind inside the
        function that is differentiated, so that gradients reach `train` alone.

    Raises:
        AdapterError: if an adapter does not fit `params`.

    Example:
        >>> import lorax_jax as lj
        >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
        >>> fn = lambda params, x: x @ params["w"] + params["b"]
        >>> plan = lj.plan(lj.LoraConfig("w", rank=1), params, fn, (jnp.ones(3),))
        >>> adapter = lj.init(plan, params, key=jax.random.key(0))
        >>> bound = lj.bind(params, adapter)
        >>> bound["w"].shape, bound["b"] is params["b"]
        ((3, 2), True)
    """
    if weights is None:
        weights = [1.0] * len(adapters)
    if not isinstance(weights, Sequence) and jnp.ndim(weights) == 0:
        weights = [weights]
    if len(weights) != len(adapters):
        raise AdapterError(
            f"`weights` has {len(weights)} entries for {len(adapters)} adapters. Give "
            "one multiplier for each, in the same order."
        )
    for weight in weights:
        _check_multiplier(weight)
    leaves, treedef = _paths.flatten(params, is_leaf=is_weight)
    key = None if key is None else as_key(key, "`bind(..., key=)`")
    current: dict[str, Any] = dict(leaves)
    # Bound before: their adapters count, so that no two draw the same mask.
    before = {p: len(leaf.terms) for p, leaf in leaves if isinstance(leaf, Adapted)}
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        _check_is_adapter(adapter)
        for name, fixed in adapter.fixed.items():
            path, train = fixed.role.path, adapter.train[name]
            if path not in current:
                raise AdapterError(_no_such_leaf(fixed.role, list(current)))
            check_parts(train, fixed)
            base, site_key = current[path], None
            if key is not None:
                site_key = jax.random.fold_in(key, index + before.get(path, 0))
            site = Site(base, train, fixed, weight, site_key)
            current[path] = KINDS[fixed.role.kind].bind(site)
    return jax.tree.unflatten(treedef, [current[path] for path, _ in leaves])


def _check_multiplier(weight: Any) -> None:
    number = isinstance(weight, int | float)
    array = hasattr(weight, "dtype") and jnp.issubdtype(weight.dtype, jnp.number)
    if not (number or array) or (number and not math.isfinite(weight)):
        raise AdapterError(
            f"`weights` holds {weight!r:.60}; a multiplier is a finite number or an "
            "array of them."
        )


def _check_is_adapter(adapter: Any) -> None:
    if not isinstance(adapter, Adapter):
        raise AdapterError(
            f"`bind` got a {type(adapter).__name__} where an `Adapter` was expected. "
            "Write `bind(params, Adapter(train, fixed))`."
        )
    if not all(isinstance(fixed, Fixed) for fixed in adapter.fixed.values()):
        raise AdapterError(
            "`fixed` of an adapter must hold `Fixed` entries. The order is "
            "`Adapter(train, fixed)`; both come from `init` or `load_adapter`."
        )
    if set(adapter.train) != set(adapter.fixed):
        odd = sorted(set(adapter.train) ^ set(adapter.fixed))
        raise AdapterError(
            f"`train` and `fixed` of an adapter name different weights: {odd}. Both "
            "must come from one `init` or `load_adapter`."
        )


def _no_such_leaf(role: Role, paths: Sequence[str]) -> str:
    near = closest(role.path, paths)
    return (
        f"The adapter adapts {role.path!r}, which the parameters do not have.\n"
        + listing("closest", near, len(paths))
        + "\nBind it to the parameters that it was planned on."
    )


def check_parts(train: Mapping[str, Any], fixed: Fixed) -> None:
    """Raises unless a site holds the arrays of its kind, and no others."""
    role = fixed.role
    if role.kind not in KINDS:
        raise AdapterError(
            f"The adapter of {role.name!r} is of the kind {role.kind!r}. Known: "
            f"{', '.join(KINDS)}."
        )
    kind = KINDS[role.kind]
    frozen = [n for n in kind.freezable if n in fixed]
    twice = [n for n in frozen if n in train]
    if twice or not train:
        raise AdapterError(
            f"The adapter of {role.name!r} "
            + (
                f"holds {twice} twice, trained and fixed. "
                if twice
                else "trains nothing. "
            )
            + "`train` and `fixed` must come from one `init` or `load_adapter`, whole."
        )
    missing = [n for n in kind.train if n not in train and n not in frozen]
    missing += [n for n in kind.fixed if n not in fixed]
    if missing:
        raise AdapterError(
            f"The adapter of {role.name!r} lacks {missing}. `train` and `fixed` "
            "must come from one `init` or `load_adapter`, whole."
        )
    known = {*kind.train, *kind.fixed, *kind.optional}
    more = sorted({*train, *fixed} - known)
    if more:
        raise AdapterError(
            f"The adapter of {role.name!r} holds {more}, of which an adapter of the "
            f"kind {role.kind!r} makes no use. `train` and `fixed` must come from one "
            "`init` or `load_adapter`."
        )
