"""`merge`: an adapter written into a new copy of the weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .. import _paths
from .._errors import AdapterError
from ..adapters import Adapted, Adapter, LowRank, bind, is_weight
from ..quant import Base
from ..structure import Unstructured


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What rounding did to one merged weight.

    Attributes:
        path: the weight.
        max_error: largest distance between the merged weight and the sum in float32.
        relative_error: norm of that difference over the norm of the adapter's delta.
        lost: share of entries whose delta was rounded away entirely.
    """

    path: str
    max_error: float
    relative_error: float
    lost: float


def merge(
    params: Any,
    *adapters: Adapter,
    weights: Sequence[Any] | None = None,
    report: bool = False,
    safe: bool = False,
) -> Any:
    r"""Builds the weights that the adapted function uses.

    $$W' = \operatorname{round}\Big(W + \sum_i w_i\,s_i\,A_i B_i\Big)$$

    The sum is taken in float32 at the highest precision of the device and rounded once
    to the weight's dtype. Every other leaf of the result is the leaf of `params`, but
    for replicated layers: what was one stack with an index becomes as many layers as
    the index names, for each has an adapter of its own.

    Args:
        params: the parameter tree; untouched.
        adapters: what to merge, in order.
        weights: one multiplier for each adapter; `None` is 1 for all.
        report: also return a list of `MergeReport`s.
        safe: refuse if a merged weight holds NaN or infinity.

    Returns:
        A new tree, or `(tree, reports)` with `report=True`.

    Raises:
        AdapterError: if an adapter does not fit, acts in one use of a tied weight only,
            or, with `safe`, yields NaN or infinity.

    Example:
        >>> import lorax_jax as lj
        >>> params = {"w": jnp.ones((3, 2))}
        >>> fn = lambda p, x: x @ p["w"]
        >>> plan = lj.plan(lj.LoraConfig("w", rank=1), params, fn, (jnp.ones(3),))
        >>> adapter = lj.init(plan, params, key=jax.random.key(0))
        >>> adapter.train["w"]["b"] = jnp.ones((1, 2))
        >>> merged = lj.merge(params, adapter)
        >>> x = jnp.ones(3)
        >>> bool(jnp.allclose(fn(merged, x), lj.adapt(fn)(lj.bind(params, adapter), x)))
        True
    """
    bound = _biases_merged(bind(params, *adapters, weights=weights))
    reports: list[MergeReport] = []

    def build(leaf):
        if not isinstance(leaf, Adapted):
            return leaf.merged() if isinstance(leaf, Base) else leaf
        merged = merged_weight(leaf, safe=safe)
        if report:
            _check_values(merged)
            errors = map(float, _errors(leaf, merged))
            reports.append(MergeReport(leaf.origin.path, *errors))
        return merged

    tree = jax.tree.map(build, bound, is_leaf=is_weight)
    return (tree, reports) if report else tree


def merged_weight(weight: Adapted, *, safe: bool = False) -> jax.Array:
    """One adapted weight as an array, summed and rounded as `merge` does.

    Args:
        weight: the weight; no term of it has a bias of B.
        safe: refuse NaN and infinity.

    Raises:
        AdapterError: as `merge`.
    """
    path = weight.origin.path
    try:
        merged = _dense(weight)
    except Unstructured as error:
        raise AdapterError(
            f"{path!r} cannot be merged: {error}. Untie the weight first: give the "
            "head a leaf of its own and adapt that."
        ) from None
    if safe:
        _check_values(merged)
    if safe and not bool(jnp.isfinite(merged).all()):
        raise AdapterError(
            f"Merging into {path!r} gives NaN or infinity. Nothing was changed; check "
            "the adapter's factors and scale."
        )
    return merged


def _check_values(merged: jax.Array) -> None:
    if isinstance(merged, Tracer):
        raise AdapterError(
            "`safe` and `report` look at values, and inside `jit` there are none yet. "
            "Merge outside, or check the result yourself."
        )


def _biases_merged(bound: Any) -> Any:
    """Moves biases of B into the model's own, beside each adapted weight.

    Raises:
        AdapterError: where the model has none.
    """
    leaves, tree = _paths.flatten(bound, is_leaf=is_weight)
    found = dict(leaves)
    for path, leaf in leaves:
        terms = leaf.terms if isinstance(leaf, Adapted) else ()
        for term in terms:
            shift = term.shift() if isinstance(term, LowRank) else None
            if shift is None:
                continue
            where = _paths.sibling(path, "bias")
            bias = found.get(where)
            bias: Any = bias.merged() if isinstance(bias, Base) else bias
            if bias is None or is_weight(bias) or bias.size != shift.size:
                raise AdapterError(
                    f"The adapter of {path!r} has a bias of B, and the model has no "
                    f"{where!r} of {shift.size} entries to merge it into. Train "
                    "without `lora_bias`, or give the layer a bias."
                )
            total = bias.astype(shift.dtype) + shift.reshape(bias.shape)
            found[where] = total.astype(bias.dtype)
        if terms:
            plain = (t.without_bias() if isinstance(t, LowRank) else t for t in terms)
            found[path] = Adapted(leaf.base, tuple(plain), leaf.origin)
    return jax.tree.unflatten(tree, [found[path] for path, _ in leaves])


# Compiled weight by weight: no more than one sum in float32 exists at a time.
_dense = jax.jit(lambda weight: weight.dense())


@jax.jit
def _errors(weight: Adapted, merged: jax.Array):
    dense = Adapted(weight.base, ()).dense()
    base = dense.astype(jnp.float32)
    exact = base
    for term in weight.terms:
        exact = term.dense(exact)
    error = merged.astype(jnp.float32) - exact
    delta = exact - base
    norm = jnp.linalg.norm(delta)
    relative = jnp.where(norm > 0, jnp.linalg.norm(error) / norm, 0.0)
    lost = (delta != 0) & (merged == dense)
    return jnp.abs(error).max(), relative, lost.mean()
