"""`Adapter` and `bind`: adapters as pytrees, and how they meet the parameters."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .. import _paths
from .._errors import AdapterError, closest, listing
from ..structure import RANK, Factor
from ._adapted import Adapted, Origin, is_weight
from ._base import Term, Use
from ._lora import LowRank


@dataclasses.dataclass(frozen=True)
class Role:
    """What the axes of one weight are to the model, and which use is adapted.

    The only static data of an adapter. It holds no shapes, ranks or scales: those are
    arrays, so that adapters which differ in them share a compiled program.

    Attributes:
        path: the leaf's path in the parameter tree.
        inputs: axes that a product sums over; A runs along them.
        outputs: axes that a product makes; B runs along them.
        batch: axes with factors of their own for each index, stacks first.
        stack: how many of the batch axes are stacks of layers.
        lookup: whether the weight is an embedding table, looked up along `inputs`.
        use: the only use of a tied weight that is adapted, or `None`.
    """

    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...] = ()
    stack: int = 0
    lookup: bool = False
    use: Use | None = None

    @property
    def name(self) -> str:
        """The key of the adapted weight in `Adapter.train` and `Adapter.fixed`."""
        return f"{self.path}@{self.use}" if self.use else self.path

    @property
    def stacked(self) -> tuple[int, ...]:
        """The batch axes that are stacks of layers."""
        return self.batch[: self.stack]

    def sizes(self, shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of some axes of a weight of this `shape`."""
        return tuple(shape[axis] for axis in axes)


@jax.tree_util.register_pytree_with_keys_class
class Fixed(Mapping[str, Any]):
    """The arrays of one adapted weight that must not move, and its `Role`.

    Args:
        role: the roles of the weight's axes.
        values: `scale` and `rank` (over the stacked axes), and what the kind of
            adapter keeps beside them.
    """

    def __init__(self, role: Role, values: Mapping[str, Any]):
        self.role = role
        self.values_ = dict(values)

    def tree_flatten_with_keys(self):
        names = tuple(sorted(self.values_))
        keyed = ((jax.tree_util.DictKey(n), self.values_[n]) for n in names)
        return tuple(keyed), (self.role, names)

    @classmethod
    def tree_unflatten(cls, static, children):
        role, names = static
        fixed = object.__new__(cls)
        fixed.role = role
        fixed.values_ = dict(zip(names, children, strict=True))
        return fixed

    def __getitem__(self, name: str) -> Any:
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def __repr__(self):
        return f"Fixed({self.role.name!r}, {self.values_})"


class Adapter(NamedTuple):
    """An adapter: what moves, and what must not.

    Both are flat dictionaries by name of the adapted weight, so any Optax
    transformation is right on `train` as it is: no mask, no labels, no frozen leaves.

    Attributes:
        train: name -> `{"a": ..., "b": ...}`, floating arrays that an optimizer moves.
        fixed: name -> `Fixed`: scale, true ranks, starting factors, and the static
            `Role`.
    """

    train: dict[str, dict[str, jax.Array]]
    fixed: dict[str, Fixed]


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
    by_path = dict(leaves)
    terms: dict[str, list[Term]] = {}
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        _check_is_adapter(adapter)
        for name, fixed in adapter.fixed.items():
            base = by_path.get(fixed.role.path)
            if base is None:
                raise AdapterError(_no_such_leaf(fixed.role, list(by_path)))
            before = len(base.terms) if isinstance(base, Adapted) else 0
            site_key = None
            if key is not None:
                site_key = jax.random.fold_in(key, index + before)
            terms.setdefault(fixed.role.path, []).append(
                _term(base, adapter.train[name], fixed, weight, site_key)
            )
    bound = [_adapted(leaf, terms[p], p) if p in terms else leaf for p, leaf in leaves]
    return jax.tree.unflatten(treedef, bound)


def _adapted(leaf: Any, terms: list[Term], path: str) -> Adapted:
    if isinstance(leaf, Adapted):  # bound before: the new terms act after the old
        return Adapted(leaf.base, (*leaf.terms, *terms), leaf.origin)
    return Adapted(leaf, tuple(terms), Origin(path))


def _term(
    base: Any, train: Mapping[str, Any], fixed: Fixed, weight: Any, key: Any
) -> Term:
    role = fixed.role
    _check_parts(train, fixed)
    a, b = train["a"], train["b"]
    _check_shapes(base, a, b, role)
    if jnp.shape(weight) not in ((), jnp.shape(fixed["scale"])):
        raise AdapterError(
            f"A multiplier in `weights` has the shape {jnp.shape(weight)}; for "
            f"{role.name!r} a number is meant, or one for each layer of its stack."
        )
    scale = (
        fixed["scale"]
        if isinstance(weight, float) and weight == 1.0
        else (fixed["scale"] * weight)
    )
    dropout = fixed.get("dropout")
    if key is not None and dropout is not None:
        key = Factor(dropout_keys(key, role, jnp.shape(dropout)), role.stacked)
        dropout = Factor(dropout, role.stacked)
    else:
        key = dropout = None
    return LowRank(
        a=_like(base, Factor(a, (*role.batch, *role.inputs, RANK))),
        b=_like(base, Factor(b, (*role.batch, RANK, *role.outputs))),
        scale=Factor(scale, role.stacked),
        key=key,
        dropout=dropout,
        lookup=role.lookup,
        use=role.use,
    )


def dropout_keys(key: jax.Array, role: Role, layers: tuple[int, ...]) -> jax.Array:
    """A key for each layer of a weight, shape `layers`."""
    key = jax.random.fold_in(key, stable_hash(role.name))
    return jax.random.split(key, layers) if layers else key


def as_key(key: Any, where: str) -> jax.Array:
    """A single PRNG key, of the new style whichever was given.

    Args:
        key: `jax.random.key(0)`, or the two integers of `jax.random.PRNGKey(0)`.
        where: the argument, for the message.

    Raises:
        AdapterError: if it is neither.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ():
        return key
    if dtype == jnp.uint32 and shape is not None and len(shape) == 1:
        return jax.random.wrap_key_data(key)
    found = f"{key!r:.60}" if dtype is None else f"an array {dtype}{list(shape or ())}"
    raise AdapterError(
        f"{where} is {found}; one PRNG key is meant, as `jax.random.key(0)` gives."
    )


def stable_hash(text: str) -> int:
    """32 bits of `text`, the same in every process, for `jax.random.fold_in`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _like(base: Any, factor: Factor) -> Factor:
    """Lays a factor out over an explicit mesh as the base's axes are laid out."""
    sharding: Any = getattr(getattr(base, "aval", None), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or not mesh.explicit_axes:
        return factor
    spec = [sharding.spec[x] if isinstance(x, int) else None for x in factor.axes]
    array = jax.sharding.reshard(factor.array, PartitionSpec(*spec))
    return Factor(array, factor.axes)


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


def _check_parts(train: Mapping[str, Any], fixed: Fixed) -> None:
    missing = [n for n in ("a", "b") if n not in train]
    missing += [n for n in ("scale", "rank") if n not in fixed]
    if missing:
        raise AdapterError(
            f"The adapter of {fixed.role.name!r} lacks {missing}. `train` and `fixed` "
            "must come from one `init` or `load_adapter`, whole."
        )


def _check_shapes(base: Any, a: Any, b: Any, role: Role) -> None:
    if not hasattr(base, "shape"):
        raise AdapterError(
            f"The parameters hold {base!r:.60} at {role.path!r}, which is no array. "
            "Bind the adapter to the parameters that it was planned on."
        )
    if not jnp.issubdtype(base.dtype, jnp.floating):
        raise AdapterError(not_floating(role.path, base.dtype))
    shape = tuple(base.shape)
    if max((*role.inputs, *role.outputs, *role.batch), default=-1) >= len(shape):
        raise AdapterError(_misfit(role, shape, a, b))
    batch = role.sizes(shape, role.batch)
    want_a = (*batch, *role.sizes(shape, role.inputs))
    want_b = (*batch, jnp.shape(a)[-1], *role.sizes(shape, role.outputs))
    if jnp.shape(a)[:-1] != want_a or jnp.shape(b) != want_b:
        raise AdapterError(_misfit(role, shape, a, b))


def not_floating(path: str, dtype: Any) -> str:
    """Why a weight of this dtype cannot be adapted."""
    return (
        f"{path!r} has the dtype {dtype}, and A B cannot be added to it: a weight must "
        "be floating. A quantized base is a `lorax_jax.quant.Base`."
    )


def _misfit(role: Role, shape: tuple[int, ...], a: Any, b: Any) -> str:
    return (
        f"The adapter of {role.name!r} does not fit the weight there.\n"
        f"  weight  shape {shape}, in {role.inputs}, out {role.outputs}, "
        f"batch {role.batch}\n"
        f"  a, b    shapes {jnp.shape(a)} and {jnp.shape(b)}\n"
        "Bind it to the parameters that it was planned on."
    )
