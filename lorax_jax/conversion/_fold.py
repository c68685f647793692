"""`fold`: a residual base and a plain adapter on it; `unfold` goes back."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from .. import _paths
from .._errors import AdapterError
from ..adapters import Adapter, Fixed, base_norm, is_weight
from ..merging import merge
from ..quant import Base
from ..replication import Replicated


def fold(params: Any, adapter: Adapter) -> tuple[Any, Adapter]:
    r"""Moves the starting factors of an adapter into a copy of its base, as PEFT does.

    $$W_{res} = \operatorname{round}(W - s\,A_0 B_0), \qquad
      W + s\,(A B - A_0 B_0) \approx W_{res} + s\,A B .$$

    The plain adapter on the residual base computes one product of rank r where the
    original computes one of 2r, and both can be trained on. The price is a base of its
    own for each adapter, and one rounding: the sum is taken in float32 at the highest
    precision and rounded once to the base's dtype, so the two sides of the second
    formula differ by half a unit in the last place of each entry of $W_{res}$: about
    6e-8 of it in float32, 4e-3 in bfloat16, where training from step 0 on therefore
    does not start at the base.

    Args:
        params: the base; untouched.
        adapter: the adapter; unchanged.

    Returns:
        `(residual, plain)`. Only adapted leaves with starting factors are new arrays in
        `residual`; all others are the same objects. `plain` holds the same `a` and `b`.
        Sites without starting factors are in it as they are, those with frozen factors
        included.

    Raises:
        AdapterError: if an adapted leaf is quantized, replicated, or tied and adapted
            for one of its uses: it has no residual of its own.

    Example:
        >>> import jax, lorax_jax as lj
        >>> params = {"w": jnp.ones((3, 2)), "bias": jnp.ones(2)}
        >>> fn = lambda params, x: x @ params["w"] + params["bias"]
        >>> plan = lj.plan(lj.LoraConfig("w", rank=1), params, fn, (jnp.ones(3),))
        >>> train, fixed = lj.init(plan, params, key=jax.random.key(0))
        >>> values = {**fixed["w"], "a0": jnp.ones((3, 1)), "b0": jnp.ones((1, 2))}
        >>> adapter = lj.Adapter(train, {"w": Fixed(fixed["w"].role, values)})
        >>> residual, plain = lj.fold(params, adapter)
        >>> residual["w"].tolist(), residual["bias"] is params["bias"]
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], True)
        >>> sorted(plain.fixed["w"])
        ['rank', 'scale']
    """
    starts = _starts(adapter)
    _check(params, starts)
    residual = merge(params, _negative(starts))
    leaves = dict(_paths.flatten(residual, is_leaf=is_weight)[0])
    train, fixed = dict(adapter.train), dict(adapter.fixed)
    for name in starts.fixed:
        site = adapter.fixed[name]
        values = {n: x for n, x in site.items() if n not in ("a0", "b0")}
        if site.role.kind == "dora":  # it keeps the norms of what it is bound to
            values["norm"] = base_norm(leaves[site.role.path], site.role)
        fixed[name] = Fixed(site.role, values)
    return residual, Adapter(train, fixed)


def unfold(
    residual: Any, plain: Adapter, start: Adapter, *, base: Any = None
) -> tuple[Any, Adapter]:
    r"""Undoes `fold`, before or after `plain` was trained on the residual base.

    $$W = \operatorname{round}(W_{res} + s\,A_0 B_0)$$

    The adapter is restored exactly: its starting factors are those of `start`, its
    others the arrays of `plain`. The base is restored bit for bit if it is given. If it
    is not, it is what the formula says, wrong by one rounding of the residual and one
    of the sum, at most a unit in the last place of the larger of the two.

    Args:
        residual: what `fold` gave; untouched.
        plain: the adapter on it.
        start: the adapter that was folded, of which the starting factors count.
        base: the parameters that were folded.

    Returns:
        `(params, adapter)`.

    Raises:
        AdapterError: if the two adapters are not for the same weights, or `base` is not
            the one that `residual` was made of.

    Example:
        >>> import jax, lorax_jax as lj
        >>> params = {"w": jnp.ones((3, 2))}
        >>> fn = lambda params, x: x @ params["w"]
        >>> plan = lj.plan(lj.LoraConfig("w", rank=1), params, fn, (jnp.ones(3),))
        >>> train, fixed = lj.init(plan, params, key=jax.random.key(0))
        >>> values = {**fixed["w"], "a0": jnp.ones((3, 1)), "b0": jnp.ones((1, 2))}
        >>> adapter = lj.Adapter(train, {"w": Fixed(fixed["w"].role, values)})
        >>> residual, plain = lj.fold(params, adapter)
        >>> params, adapter = lj.unfold(residual, plain, adapter, base=params)
        >>> params["w"][0].tolist(), sorted(adapter.fixed["w"])
        ([1.0, 1.0], ['a0', 'b0', 'rank', 'scale'])
    """
    starts = _starts(start)
    _check_same(plain, start)
    _check(residual, starts)
    if base is None:
        params = merge(residual, starts)
    else:
        _check_residual(residual, base, starts)
        params = base
    leaves = dict(_paths.flatten(params, is_leaf=is_weight)[0])
    fixed = dict(plain.fixed)
    for name in starts.fixed:
        site = plain.fixed[name]
        values = {**site, **{n: start.fixed[name][n] for n in ("a0", "b0")}}
        if site.role.kind == "dora":
            values["norm"] = base_norm(leaves[site.role.path], site.role)
        fixed[name] = Fixed(site.role, values)
    return params, Adapter(dict(plain.train), fixed)


def _starts(adapter: Adapter) -> Adapter:
    """The starting factors as a plain adapter."""
    train, fixed = {}, {}
    for name, site in adapter.fixed.items():
        if "a0" in site:
            role = dataclasses.replace(site.role, kind="lora")
            train[name] = {"a": site["a0"], "b": site["b0"]}
            fixed[name] = Fixed(role, {n: site[n] for n in ("scale", "rank")})
    return Adapter(train, fixed)


def _negative(adapter: Adapter) -> Adapter:
    fixed = {
        name: Fixed(site.role, {**site, "scale": -site["scale"]})
        for name, site in adapter.fixed.items()
    }
    return Adapter(adapter.train, fixed)


def _check(params: Any, starts: Adapter) -> None:
    leaves = dict(_paths.flatten(params, is_leaf=is_weight)[0])
    for name, site in starts.fixed.items():
        leaf = leaves.get(site.role.path)
        why = None
        if isinstance(leaf, Replicated):
            why = "holds layers that are replicated, which share one array"
        elif isinstance(leaf, Base):
            why = "is quantized, and a residual is not"
        elif is_weight(leaf):
            why = "is adapted already"
        elif site.role.use is not None:
            why = f"is tied, and adapted as the {site.role.use} alone"
        if why is not None:
            raise AdapterError(
                f"{name!r} cannot be folded: its weight {why}. Use the adapter as it "
                "is, which leaves the base untouched, or `to_lora(adapter)`, which is "
                "exact on the same base."
            )


def _check_same(plain: Adapter, start: Adapter) -> None:
    roles = [{n: f.role for n, f in one.fixed.items()} for one in (plain, start)]
    shapes = [
        {
            n: {k: jnp.shape(x[k]) for k in ("a", "b") if k in x}
            for n, x in sites.items()
        }
        for sites in (_arrays(plain), _arrays(start))
    ]
    if roles[0] != roles[1] or shapes[0] != shapes[1]:
        odd = sorted(
            name
            for name in {*roles[0], *roles[1]}
            if any(x[0].get(name) != x[1].get(name) for x in (roles, shapes))
        )
        raise AdapterError(
            f"`start` is not the adapter that was folded: it differs from `plain` "
            f"about {odd[:4]}. Give the one that `fold` got."
        )


def _arrays(adapter: Adapter) -> dict[str, dict[str, Any]]:
    sites = adapter.fixed.items()
    return {name: {**site, **adapter.train.get(name, {})} for name, site in sites}


def _check_residual(residual: Any, base: Any, starts: Adapter) -> None:
    found, wanted = (
        dict(_paths.flatten(tree, is_leaf=is_weight)[0])
        for tree in (residual, merge(base, _negative(starts)))
    )
    for name, site in starts.fixed.items():
        one: Any = found.get(site.role.path)
        other = wanted[site.role.path]
        same = getattr(one, "dtype", None) == other.dtype
        if not (same and bool(jnp.array_equal(one, other))):
            raise AdapterError(
                f"`base` is not what `residual` was made of: {name!r} has another "
                "residual. Give the parameters that `fold` got, or leave `base` out."
            )
