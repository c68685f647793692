"""`merge`: an adapter written into a new copy of the weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._errors import AdapterError
from ..adapters import Adapted, Adapter, bind
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
    to the weight's dtype. Every other leaf of the result is the leaf of `params`.

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
    bound = bind(params, *adapters, weights=weights)
    reports: list[MergeReport] = []

    def build(leaf):
        if not isinstance(leaf, Adapted):
            return leaf
        path = leaf.origin.path
        try:
            merged = _dense(leaf)
        except Unstructured as error:
            raise AdapterError(
                f"{path!r} cannot be merged: {error}. Untie the weight first: give "
                "the head a leaf of its own and adapt that."
            ) from None
        if (safe or report) and isinstance(merged, Tracer):
            raise AdapterError(
                "`safe` and `report` look at values, and inside `jit` there are none "
                "yet. Merge outside, or check the result yourself."
            )
        if safe and not bool(jnp.isfinite(merged).all()):
            raise AdapterError(
                f"Merging into {path!r} gives NaN or infinity. Nothing was changed; "
                "check the adapter's factors and scale."
            )
        if report:
            reports.append(MergeReport(path, *map(float, _errors(leaf, merged))))
        return merged

    tree = jax.tree.map(build, bound, is_leaf=lambda x: isinstance(x, Adapted))
    return (tree, reports) if report else tree


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
