"""The plan that a file's sites amount to."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from .._config import LoraConfig, Rule
from ..adapters import Adapter, Fixed
from ..planning import Plan, Site, Slot, parameters
from ._factors import Matrices, join
from ._resolve import Tree
from ._sites import Placed


def plan_of(
    placed: Sequence[Placed], tree: Tree, *, rslora: bool, dtype: Any, plan: Plan | None
) -> Plan:
    """The plan of the sites that were found.

    Args:
        placed: the sites and where they are.
        tree: the parameters.
        rslora: whether scales are `alpha / sqrt(rank)`.
        dtype: of the factors.
        plan: the plan that was given; it is returned if it says the same.

    Returns:
        A plan whose rules name exactly these sites.
    """
    settings = [_settings(place) for place in placed]
    counted = collections.Counter(setting[:3] for setting in settings)
    usual = counted.most_common(1)[0][0]
    groups: dict[tuple[Any, ...], list[str]] = {}
    for place, setting in zip(placed, settings, strict=True):
        path = place.site.path
        groups.setdefault((*setting, _digits(path)), []).append(path)
    rules, pattern_of = [], {}
    for (rank, alpha, dropout, tie, _), paths in groups.items():
        pattern = _pattern(paths)
        over = zip(
            ("rank", "alpha", "dropout"), (rank, alpha, dropout), usual, strict=True
        )
        rules.append(Rule(pattern, tie=tie, **{k: v for k, v, u in over if v != u}))
        for path in paths:
            pattern_of[path, rank, alpha, dropout, tie] = pattern
    config = LoraConfig(
        rules,
        rank=usual[0],
        alpha=usual[1],
        dropout=usual[2],
        rslora=rslora,
        dtype=dtype,
    )
    by_slot: dict[str, dict[int, Site]] = {}
    slots: dict[str, Slot] = {}
    for place, setting in zip(placed, settings, strict=True):
        rule = pattern_of[place.site.path, *setting]
        slots[place.slot.name] = place.slot
        by_slot.setdefault(place.slot.name, {})[place.index] = _site(place, rule)
    if plan is not None:
        known = {slot.name: slot for slot in plan.slots}
        same = set(known) == set(slots) and all(
            _alike(known[name].sites, by_slot[name]) for name in known
        )
        if same:
            return plan
    order = {path: i for i, path in enumerate(tree.leaves)}
    whole = [
        dataclasses.replace(
            slot,
            sites=tuple(
                by_slot[name].get(i) for i in range(max(1, math.prod(slot.layers)))
            ),
        )
        for name, slot in sorted(
            slots.items(), key=lambda item: (order[item[1].role.path], item[0])
        )
    ]
    counts = collections.Counter(
        site.rule for slot in whole for site in slot.sites if site
    )
    leaves = tree.leaves.values()
    return Plan(
        config,
        tuple(whole),
        sum(math.prod(leaf.shape) for leaf in leaves),
        sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in leaves),
        tuple((rule.pattern, counts[rule.pattern]) for rule in rules),
    )


def adapter_of(plan: Plan, placed: Iterable[tuple[Placed, Matrices]]) -> Adapter:
    """The adapter that these matrices make."""
    groups: dict[str, dict[int, tuple[Placed, Matrices]]] = {}
    for place, matrices in placed:
        groups.setdefault(place.slot.name, {})[place.index] = place, matrices
    train, fixed = {}, {}
    for slot in plan.slots:
        group = groups[slot.name]
        train[slot.name] = join(slot, {i: m for i, (_, m) in group.items()})
        fixed[slot.name] = Fixed(slot.role, _values(slot, group))
    return Adapter(train, fixed)


def _values(slot: Slot, group: Mapping[int, tuple[Placed, Any]]) -> dict[str, Any]:
    sites = [group[i][0].site if i in group else None for i in range(len(slot.sites))]

    def over_layers(name: str, dtype: Any) -> Any:
        values = [getattr(site, name) if site else 0 for site in sites]
        return jnp.asarray(values, dtype).reshape(slot.layers)

    found = {
        "scale": over_layers("scale", jnp.float32),
        "rank": over_layers("rank", jnp.int32),
    }
    if any(site is not None and site.dropout for site in sites):
        found["dropout"] = over_layers("dropout", jnp.float32)
    return found


def _settings(place: Placed) -> tuple[int, float, float, str | None]:
    site = place.site
    tie = "shared" if site.tied is not None else site.use
    return site.rank, site.alpha, site.dropout, tie


def _site(place: Placed, rule: str) -> Site:
    site, slot = place.site, place.slot
    role = slot.role
    index = []
    left = place.index
    for n in reversed(slot.layers):
        index.append(left % n)
        left //= n
    kept = [axis for axis in range(len(slot.shape)) if axis not in role.stacked]
    return Site(
        path=site.path,
        leaf=role.path,
        part=tuple(zip(role.stacked, reversed(index), strict=True)),
        use=role.use,
        shape=role.sizes(slot.shape, kept),
        role=role,
        rank=site.rank,
        alpha=site.alpha,
        scale=site.scale,
        rule=rule,
        init=True,
        dropout=site.dropout,
        trainable=parameters(role, slot.shape, site.rank),
    )


def _alike(known: Sequence[Site | None], found: Mapping[int, Site]) -> bool:
    def facts(site: Site | None) -> Any:
        return site and (site.rank, site.alpha, site.scale, site.dropout)

    return all(facts(site) == facts(found.get(i)) for i, site in enumerate(known))


def _digits(path: str) -> tuple[str, ...]:
    return tuple("#" if part.isdigit() else part for part in path.split("/"))


def _pattern(paths: Sequence[str]) -> str:
    """A regex of exactly these paths, which differ in numbers alone.

    >>> _pattern(["h/0/q", "h/2/q"])
    'h/(?:0|2)/q'
    """
    columns = list(zip(*(path.split("/") for path in paths), strict=True))
    differ = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if len(differ) > 1:
        return "(?:" + "|".join(map(re.escape, paths)) + ")"
    parts = [re.escape(column[0]) for column in columns]
    for i in differ:
        parts[i] = "(?:" + "|".join(dict.fromkeys(columns[i])) + ")"
    return "/".join(parts)
