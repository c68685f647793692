"""The plan that a file's sites amount to."""

import collections
import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import _paths
from .._config import LoraConfig
from .._errors import CheckpointError
from .._parts import PartRule, Where
from .._ranges import Ranges
from .._rule import Rule
from ..adapters import Adapter, Fixed, base_norm, stored
from ..planning import Plan, Site, Slot, parameters
from ._arrays import Tensors, join
from ._file_site import FileSite
from ._placed import Placed
from ._resolve import Tree


def plan_of(
    placed: Sequence[Placed],
    tree: Tree,
    *,
    rslora: bool,
    bias: str,
    layer_replication: Ranges | None,
    dtype: Any,
    plan: Plan | None,
) -> Plan:
    """The plan of the sites that were found.

    Args:
        placed: the sites and where they are.
        tree: the parameters.
        rslora: whether scales are `alpha / sqrt(rank)`.
        bias: which biases the configuration asked for.
        layer_replication: how the layers are repeated.
        dtype: of the factors.
        plan: the plan that was given; it is returned if it says the same.

    Returns:
        A plan whose rules name exactly these sites.
    """
    more = {"rslora": rslora, "bias": bias, "layer_replication": layer_replication}
    config, rule_of = _config(placed, bias, more | {"dtype": dtype})
    by_slot: dict[str, dict[int, Site]] = {}
    slots: dict[str, Slot] = {}
    for place in placed:
        slots[place.slot.name] = place.slot
        site = _site(place, rule_of[place.site.name])
        by_slot.setdefault(place.slot.name, {})[place.index] = site
    if plan is not None:
        known = {slot.name: slot for slot in plan.slots}
        same = set(known) == set(slots) and all(
            _alike(known[name].sites, by_slot[name]) for name in known
        )
        if same:
            return plan
    leaves = {path: i for i, path in enumerate(tree.leaves)}

    def order(name: str) -> tuple[bool, int, str]:  # factors first, as in any plan
        role = slots[name].role
        return role.kind in ("whole", "rows"), leaves[role.path], name

    whole = [
        dataclasses.replace(
            slot,
            sites=tuple(
                by_slot[name].get(i) for i in range(max(1, math.prod(slot.layers)))
            ),
        )
        for name, slot in sorted(slots.items(), key=lambda item: order(item[0]))
    ]
    for slot in whole:
        if slot.role.stack > 1 and slot.role.kind == "whole" and None in slot.sites:
            raise CheckpointError(
                f"The file holds {slot.role.path!r} whole for some of its layers, "
                "which are stacks within stacks here. Unroll one of the two, or train "
                "all of its layers."
            )
    counts = collections.Counter(
        site.rule for slot in whole for site in slot.sites if site
    )
    base, base_bytes = stored(list(tree.leaves.values()))
    return Plan(
        config,
        tuple(whole),
        base,
        base_bytes,
        tuple((rule.pattern, counts[rule.pattern]) for rule in config.rules or ()),
    )


def adapter_of(
    plan: Plan, placed: Iterable[tuple[Placed, Tensors]], base: Tree | None
) -> Adapter:
    """The adapter that these tensors make.

    Args:
        plan: the plan of the sites.
        placed: the sites, where they are, and their tensors.
        base: the parameters, of which DoRA keeps norms; `None` leaves those out.

    Raises:
        CheckpointError: if norms are needed and the parameters have no values.
    """
    groups: dict[str, dict[int, tuple[Placed, Tensors]]] = {}
    for place, tensors in placed:
        groups.setdefault(place.slot.name, {})[place.index] = place, tensors
    train, fixed = {}, {}
    for slot in plan.slots:
        group = groups[slot.name]
        arrays = join(slot, {i: t for i, (_, t) in group.items()})
        kept = {"a0", "b0", *_frozen(slot, group)}
        train[slot.name] = {n: x for n, x in arrays.items() if n not in kept}
        values = _values(slot, group)
        values |= {n: x for n, x in arrays.items() if n in kept}
        if slot.role.kind == "dora" and base is not None:
            values["norm"] = _norm(base.leaves[slot.role.path], slot)
        fixed[slot.name] = Fixed(slot.role, values)
    return Adapter(train, fixed)


def _frozen(slot: Slot, group: Mapping[int, tuple[Placed, Any]]) -> tuple[str, ...]:
    """Which factors of a leaf are not trained."""
    said = {place.site.frozen for place, _ in group.values()}
    if len(said) > 1:
        raise CheckpointError(
            f"The file freezes factors of some layers of {slot.role.path!r} and trains "
            "those of others, which are one array here. Load it onto a model whose "
            "layers are unrolled."
        )
    return said.pop()


def _norm(leaf: Any, slot: Slot) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise CheckpointError(
            f"The adapter of {slot.role.path!r} is DoRA, which keeps the norms of the "
            "base weight, and `params` has only its type there. Give parameters that "
            "hold values."
        )
    return base_norm(leaf, slot.role)


def _values(slot: Slot, group: Mapping[int, tuple[Placed, Any]]) -> dict[str, Any]:
    if slot.role.kind == "rows":
        return {"ids": jnp.asarray(slot.ids, jnp.int32)}
    if slot.role.kind == "whole":
        some = len(slot.adapted) < len(slot.sites)
        return {"layers": jnp.asarray(slot.adapted, jnp.int32)} if some else {}
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


Names = dict[tuple[str, str | None], str]


def _config(
    placed: Sequence[Placed], bias: str, more: Mapping[str, Any]
) -> tuple[LoraConfig, Names]:
    """A configuration that names exactly these sites, and which rule takes which."""
    rule_of: Names = {}
    sites = [place.site for place in placed]
    factors = [site for site in sites if site.low_rank]
    counts = collections.Counter(_numbers(site) for site in factors)
    usual: dict[str, Any] = dict(
        zip(_NUMBERS, counts.most_common(1)[0][0], strict=True)
    )
    leaves: dict[tuple[str, str | None], list[Placed]] = {}  # parts of one together
    for place in placed:
        if place.site.low_rank:
            leaves.setdefault((place.site.path, place.site.use), []).append(place)
    groups: dict[tuple[Any, ...], list[FileSite]] = {}
    for (path, _), places in leaves.items():
        key = _overrides(places, usual), _digits(path)
        groups.setdefault(key, []).extend(place.site for place in places)
    rules = []
    for (overrides, _), group in groups.items():
        rules.append(Rule(_name(rule_of, group), **dict(overrides)))
    adapted = {_paths.sibling(site.path, "bias") for site in factors}
    families: dict[tuple[str, ...], list[FileSite]] = {}
    token_rows = {}
    for site in sites:
        if site.kind == "rows":
            token_rows[_name(rule_of, [site])] = site.ids
        elif site.kind == "whole":
            if is_bias(site.path, bias, adapted):
                rule_of[site.name] = f"`bias` = {bias!r}"
            else:
                families.setdefault(_digits(site.path), []).append(site)
    whole = [_name(rule_of, group) for group in families.values()]
    config = LoraConfig(
        rules,
        **usual,
        lora_bias=any(site.bias for site in factors),
        whole=whole,
        token_rows=token_rows,
        **more,
    )
    return config, rule_of


_NUMBERS = ("rank", "alpha", "dropout", "dora", "init")


def _numbers(site: FileSite) -> tuple[Any, ...]:
    init = True if site.init is None else site.init
    return site.rank, site.alpha, site.dropout, site.kind == "dora", init


def _overrides(places: Sequence[Placed], usual: dict[str, Any]) -> tuple[Any, ...]:
    """What the rule of a leaf says, as pairs; the places are its parts, or it."""
    site, role = places[0].site, places[0].slot.role
    found: dict[str, Any] = {"tie": "shared" if site.tied is not None else site.use}
    if role.groups == 1:
        found["batch"] = role.leaf.batch[role.stack :]
    if role.part is None:
        return *found.items(), *_unusual(site, usual, _NUMBERS)
    parts = []
    for site, slot, _ in places:
        assert slot.role.part is not None
        where = (
            Where(
                axis,
                tuple(run.size for run in runs) if len(runs) > 1 else (),
                tuple((run.start, run.stop, run.step) for run in runs),
            )
            for axis, runs in enumerate(slot.role.part.axes)
            if runs is not None
        )
        numbers = _unusual(site, usual, ("rank", "alpha", "dropout", "init"))
        parts.append(PartRule(slot.role.part.name, tuple(where), **dict(numbers)))
    return *found.items(), ("parts", tuple(parts)), *_unusual(site, usual, ("dora",))


def _unusual(site: FileSite, usual: dict[str, Any], names: Sequence[str]) -> Any:
    values: dict[str, Any] = dict(zip(_NUMBERS, _numbers(site), strict=True))
    return tuple((name, values[name]) for name in names if values[name] != usual[name])


def _name(rule_of: Names, sites: Sequence[FileSite]) -> str:
    """A pattern of the sites, noted down as the rule of each."""
    pattern = _pattern(list(dict.fromkeys(site.path for site in sites)))
    rule_of |= dict.fromkeys((site.name for site in sites), pattern)
    return pattern


def is_bias(path: str, bias: str, adapted: Collection[str]) -> bool:
    """Whether `bias` of the configuration trains the leaf.

    Args:
        path: its path.
        bias: the configuration's.
        adapted: paths of the biases beside weights that have factors.

    >>> is_bias("h/0/q/bias", "all", ()), is_bias("h/0/q/bias", "lora_only", ())
    (True, False)
    """
    if bias == "all":
        return path.split("/")[-1] == "bias"
    return bias == "lora_only" and path in adapted


def _site(place: Placed, rule: str) -> Site:
    site, slot = place.site, place.slot
    role = slot.role
    index = []
    left = place.index
    for n in reversed(slot.layers):
        index.append(left % n)
        left //= n
    vectors = site.bias + (site.kind == "dora")
    values = parameters(role, slot.shape, site.rank, vectors, site.frozen)
    if site.kind == "rows":
        values = len(site.ids) * math.prod(slot.outputs)
    elif site.kind == "whole":
        values = math.prod(slot.outputs)
    return Site(
        path=site.path,
        leaf=role.path,
        part=tuple(zip(role.stacked, reversed(index), strict=True)),
        use=role.use,
        shape=role.layer_shape(slot.shape),
        role=role,
        rank=site.rank,
        alpha=site.alpha,
        scale=site.scale,
        rule=rule,
        init=True if site.init is None else site.init,
        dropout=site.dropout,
        trainable=values,
        frozen=site.frozen,
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
