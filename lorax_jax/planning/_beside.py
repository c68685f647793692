"""What is trained beside the low-rank factors: whole leaves, biases, rows of tables."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from .. import _paths
from .._config import LoraConfig
from .._errors import PlanError, closest, listing
from .._rule import Rule
from ..adapters import Role, not_floating
from ..transform import Leaf
from ._candidates import Candidate, matches
from ._find_role import stacks_of
from ._sites import Site, Slot, part_indices
from ._token_axis import token_axis


def beside(
    config: LoraConfig,
    candidates: Sequence[Candidate],
    slots: Sequence[Slot],
    dtypes: Mapping[str, Any],
) -> list[Slot]:
    """Slots of leaves trained whole and of token rows, for a configuration.

    Args:
        config: asks for them by `whole`, `bias` and `token_rows`.
        candidates: every path that may be meant.
        slots: the leaves that have low-rank factors.
        dtypes: dtypes of the leaves.

    Raises:
        PlanError: if a pattern matches nothing, or a leaf that is adapted already.
    """
    chosen: dict[str, dict[tuple[int, ...], tuple[Candidate, str]]] = {}
    for pattern in config.whole:
        _choose(chosen, candidates, pattern, f"`whole` = {pattern!r}")
    if config.bias == "all":
        _choose(chosen, candidates, r"(.*/)?bias", "`bias` = 'all'")
    elif config.bias == "lora_only":
        _choose_siblings(chosen, candidates, slots)
    taken = {slot.role.path for slot in slots}
    out = []
    for path, sites in chosen.items():
        if path in taken:
            raise PlanError(
                f"{path!r} is to be trained whole, and a target adapts it too. Leave "
                "it out of one, e.g. with `exclude`."
            )
        out.append(_whole(sites, dtypes))
    leaves = {c.leaf.path: c.leaf for c in candidates}
    for pattern, ids in config.token_rows:
        for leaf in _tables(leaves, pattern):
            if leaf.path in chosen:
                raise PlanError(
                    f"{leaf.path!r} is trained whole, and `token_rows` names rows of "
                    "it too. Leave one of the two out."
                )
            if any(slot.ids and slot.role.path == leaf.path for slot in out):
                raise PlanError(
                    f"Two entries of `token_rows` name rows of {leaf.path!r}. Name the "
                    "table once, with all of its rows."
                )
            out.append(_rows(leaf, ids, pattern, dtypes))
    return out


def _choose(chosen: dict, candidates: Iterable[Candidate], pattern: str, what: str):
    found, rule = False, Rule(pattern)
    for candidate in candidates:
        if matches(rule, candidate):
            found = True
            leaf = chosen.setdefault(candidate.leaf.path, {})
            leaf.setdefault(candidate.index, (candidate, pattern))
    if not found:
        paths = [candidate.path for candidate in candidates]
        raise PlanError(
            f"{what} matched no parameter (whole path, re.fullmatch).\n"
            + listing("closest", closest(pattern, paths), len(paths))
        )


def _choose_siblings(
    chosen: dict, candidates: Iterable[Candidate], slots: Iterable[Slot]
) -> None:
    """The biases beside adapted weights: `attn/q/bias` for `attn/q/kernel`."""
    adapted = {site.path for slot in slots for site in slot.sites if site is not None}
    wanted = {_paths.sibling(path, "bias") for path in adapted}
    found = False
    for candidate in candidates:
        if candidate.path in wanted:
            found = True
            leaf = chosen.setdefault(candidate.leaf.path, {})
            leaf[candidate.index] = candidate, "bias beside a target"
    if not found:
        raise PlanError(
            "`bias` = 'lora_only' trains the leaf `bias` beside each adapted weight, "
            f"and none of the {len(adapted)} has one: no {min(wanted)!r}, say. Name "
            "the leaves in `whole`."
        )


def _whole(sites: Mapping[tuple[int, ...], tuple[Candidate, str]], dtypes) -> Slot:
    leaf = next(iter(sites.values()))[0].leaf
    dtype = dtypes[leaf.path]
    if not jnp.issubdtype(dtype, jnp.floating):
        raise PlanError(not_floating(leaf.path, dtype) + " It cannot be trained.")
    stacks = tuple(stacks_of(leaf))
    rest = tuple(i for i in range(len(leaf.shape)) if i not in stacks)
    role = Role(leaf.path, (), rest, stacks, len(stacks), kind="whole")
    indices = list(part_indices(role, leaf.shape))
    if len(sites) < len(indices) and len(stacks) > 1:
        raise PlanError(
            f"{leaf.path!r} holds stacks within stacks, and only some of its layers "
            "are to be trained whole. Train all of them, or none."
        )
    shape = role.sizes(leaf.shape, rest)
    return Slot(
        role,
        leaf.shape,
        dtype,
        tuple(
            _site(role, shape, index, *sites[index]) if index in sites else None
            for index in indices
        ),
    )


def _site(
    role: Role,
    shape: tuple[int, ...],
    index: tuple[int, ...],
    candidate: Candidate,
    rule: str,
) -> Site:
    return Site(
        path=candidate.path,
        leaf=role.path,
        part=tuple(zip(role.stacked, index, strict=True)),
        use=None,
        shape=shape,
        role=role,
        rank=0,
        alpha=0.0,
        scale=1.0,
        rule=rule,
        init=True,
        dropout=0.0,
        trainable=math.prod(shape),
    )


def _tables(leaves: Mapping[str, Leaf], pattern: str | None) -> list[Leaf]:
    """The tables whose rows are meant."""
    tables = {path: leaf for path, leaf in leaves.items() if leaf.of_kind("lookup")}
    if pattern is None:
        if len(tables) == 1:
            return list(tables.values())
        raise PlanError(
            f"`token_rows` does not say of which table, and the function looks up "
            f"{len(tables)}.\n"
            + listing("tables", list(tables), len(tables))
            + "\nName it:  token_rows={'<path of the table>': [...]}"
        )
    rule = Rule(pattern)
    found = [leaf for path, leaf in leaves.items() if rule.matches(path)]
    if not found:
        raise PlanError(
            f"`token_rows` names {pattern!r}, which matches no parameter.\n"
            + listing("tables", list(tables), len(tables))
        )
    return found


def _rows(leaf: Leaf, ids: tuple[int, ...], pattern: str | None, dtypes) -> Slot:
    dtype = dtypes[leaf.path]
    if not jnp.issubdtype(dtype, jnp.floating):
        raise PlanError(not_floating(leaf.path, dtype) + " Its rows cannot be trained.")
    axis = _row_axis(leaf)
    count = leaf.shape[axis]
    if ids[-1] >= count:
        raise PlanError(
            f"`token_rows` asks for row {ids[-1]} of {leaf.path!r}, which has {count}. "
            "New tokens need a larger table first: `lj.grow(params, ...)`."
        )
    rest = tuple(i for i in range(len(leaf.shape)) if i != axis)
    role = Role(leaf.path, (axis,), rest, lookup=True, kind="rows")
    shape = (len(ids), *role.sizes(leaf.shape, rest))
    whole = Candidate(leaf.path, leaf, (), None)
    site = _site(role, leaf.shape, (), whole, pattern or "token_rows")
    site = dataclasses.replace(site, trainable=math.prod(shape))
    return Slot(role, leaf.shape, dtype, (site,), ids=ids)


def _row_axis(leaf: Leaf) -> int:
    axis = token_axis(leaf)
    if axis is None:
        raise PlanError(
            f"`token_rows` names {leaf.path!r} of shape {leaf.shape}, which the "
            "function neither looks up along one axis nor multiplies as a head. Its "
            "rows cannot be told."
        )
    return axis
