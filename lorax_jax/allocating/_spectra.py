"""`spectra`: how the energy of each site's weight, or of its inputs, is spread."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import _paths
from .._errors import PlanError, closest, shorten
from ..adapters import Role, is_weight, on_device
from ..planning import Plan, Slot, Spectra, layer_matrices
from ..statistics import GradientFactors


def spectra(
    plan: Plan,
    params: Any = None,
    *,
    stats: Mapping[str, Any] | None = None,
    size: int | None = None,
) -> Spectra:
    r"""What each direction of each site is worth.

    Of weights, with $\sigma_i$ their singular values, the energies $\sigma_i^2$, whose
    sum is $\lVert W \rVert_F^2$. Of statistics of the inputs, the variances along
    principal directions, whose sum is the total variance. Of gradients, the squares of
    the singular values that were found. Those of experts and groups are added, the
    first of each, the second of each, as a rank of the site gives each of them one.

    Args:
        plan: whose sites: all that have a rank.
        params: the parameter tree, for the spectra of weights.
        stats: instead of it, name of an adapted weight -> the state of a statistic that
            has `principal(k)`, or `GradientFactors`.
        size: of statistics, how many directions; `None` is twice the site's rank, which
            is how far EVA looks.

    Returns:
        `Spectra`: name of a site -> energies, descending.

    Raises:
        PlanError: if neither or both of `params` and `stats` are given, if they are not
            those of the plan, if `params` are types, or if values are not finite.

    Example:
        >>> import lorax_jax as lj
        >>> params = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
        >>> fn = lambda params, x: x @ params["w"]
        >>> plan = lj.plan(lj.LoraConfig("w", rank=1), params, fn, (jnp.ones(3),))
        >>> found = lj.spectra(plan, params)
        >>> found["w"].round(3).tolist(), round(found.explained("w", 2), 3)
        ([9.0, 4.0, 1.0], 0.929)
    """
    if (params is None) == (stats is None):
        raise PlanError(
            "`spectra` looks at weights, `spectra(plan, params)`, or at statistics, "
            "`spectra(plan, stats=stats)`; give one of the two."
        )
    energies: dict[str, np.ndarray] = {}
    totals: dict[str, float] = {}
    if stats is None:
        found = _of_weights(plan, params)
    else:
        found = _of_stats(plan, stats, size)
    for slot, values, total in found:
        apart = tuple(range(1, 1 + len(slot.apart)))
        values = np.asarray(values, np.float64).sum(axis=apart)  # (sites, n)
        total = np.asarray(total, np.float64).sum(axis=apart)  # (sites,)
        for i, site in enumerate(slot.sites):
            if site is not None:
                # Rounding may leave what is zero below it, and equals out of order.
                energies[site.name] = np.minimum.accumulate(np.maximum(values[i], 0))
                totals[site.name] = float(total[i])
    return Spectra(energies, totals)


def singular_values(
    plan: Plan, params: Any, slots: tuple[Slot, ...] | None = None
) -> Iterator[tuple[Slot, Float[Array, "sites *apart n"]]]:
    """The singular values of all sites, descending, a slot at a time.

    The layers of a stack are decomposed one by one in one call, so that float32 copies
    of all of them never are there at once; leaves of one shape share a program.

    Raises:
        PlanError: if `params` is not the tree of the plan, or holds types in place of
            values.
    """
    leaves = dict(_paths.flatten(params, is_leaf=is_weight)[0])
    for slot in ranked(plan) if slots is None else slots:
        leaf = leaves.get(slot.role.path)
        if leaf is None or tuple(leaf.shape) != slot.shape:
            found = "no such leaf" if leaf is None else tuple(leaf.shape)
            raise PlanError(
                f"The plan has {slot.role.path!r} with shape {slot.shape}, and "
                f"`params` has {found}. Give the parameters that the plan was made on."
            )
        if _paths.of_types(leaf):
            raise PlanError(
                f"The weight at {slot.role.path!r} is known by its type alone, and its "
                "singular values are asked for. Give the parameters themselves, not "
                "what `jax.eval_shape` says of them."
            )
        # The path would cost a program for each leaf.
        role = dataclasses.replace(slot.role, path="")
        yield slot, _decompose(on_device(leaf), role, len(slot.sites))


def ranked(plan: Plan) -> tuple[Slot, ...]:
    """The slots that have ranks."""
    return tuple(slot for slot in plan.slots if slot.role.kind in ("lora", "dora"))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _decompose(leaf: Any, role: Role, count: int) -> jax.Array:
    def values(layer: jax.Array) -> jax.Array:
        matrices = layer_matrices(leaf, layer, role).astype(jnp.float32)
        return jnp.linalg.svd(matrices, compute_uv=False)

    return jax.lax.map(values, jnp.arange(count))


def _of_weights(plan: Plan, params: Any) -> Iterator[tuple[Slot, Any, Any]]:
    for slot, values in singular_values(plan, params):
        energies = np.asarray(values, np.float64) ** 2
        yield slot, energies, energies.sum(axis=-1)


def _of_stats(
    plan: Plan, stats: Mapping[str, Any], size: int | None
) -> Iterator[tuple[Slot, Any, Any]]:
    for slot in ranked(plan):
        if slot.name not in stats:
            near = shorten(closest(slot.name, stats))
            raise PlanError(
                f"`stats` has nothing for {slot.name!r}. Closest: {near}. Gather them "
                "with this plan."
            )
        state, lead = stats[slot.name], (*slot.layers, *slot.apart)
        if isinstance(state, GradientFactors):
            values = state.s**2
            total = values.sum(axis=-1)
        elif hasattr(state, "principal"):
            k = min(2 * slot.rank if size is None else size, slot.sides[0])

            def principal(state, k=k):
                found = state.principal(k)
                return found.variances, found.total

            for _ in lead:
                principal = jax.vmap(principal)
            values, total = principal(state)
        else:
            raise PlanError(
                f"The statistic of {slot.name!r}, {type(state).__name__}, knows no "
                "principal directions. Gather `Moments`, `Pca` or `Sketch`."
            )
        if values.shape[:-1] != lead:
            raise PlanError(
                f"The statistic of {slot.name!r} has the leading axes "
                f"{values.shape[:-1]}, and the plan {lead}. Gather it with this plan."
            )
        shape = (len(slot.sites), *slot.apart)
        yield slot, values.reshape(*shape, values.shape[-1]), total.reshape(shape)
