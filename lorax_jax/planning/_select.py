"""Which leaves a configuration takes, and in which role."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from .._config import LoraConfig
from .._errors import PlanError, closest, listing
from .._rule import ALL_LINEAR, Rule
from ..adapters import Role, named, not_floating
from ..transform import Leaf
from ._begin import check_frozen, check_method
from ._candidates import Candidate, candidates, matches
from ._find_role import find_role, is_linear, max_rank, table_rows
from ._parts import check_names, check_summed, roles_of_parts, with_batch
from ._sites import Site, Slot, parameters, part_indices
from ._tie import check_ties

# Query and value projections under the names that architectures give them: what PEFT
# adapts when it is told nothing. The first pattern that matches anything is taken.
_USUAL_TARGETS = (
    r".*/(q_proj|v_proj)/kernel",
    r".*/c_attn/kernel",
    r".*/(query|value)/kernel",
    r".*/query_key_value/kernel",
    r".*/qkv_proj/kernel",
)


class Selection:
    """Matches rules to leaves, and remembers who matched what."""

    def __init__(
        self,
        config: LoraConfig,
        leaves: Mapping[str, Leaf],
        dtypes: Mapping[str, Any],
    ):
        self.config = config
        self.leaves = leaves
        self.dtypes = dtypes
        self.candidates = [c for leaf in leaves.values() for c in candidates(leaf)]
        self.rows = table_rows(leaves)
        self.rules = self._rules()
        self.excluded = [Rule(pattern) for pattern in config.exclude]
        self.counts = [0] * len(self.rules)
        self.shadowed = [0] * len(self.rules)

    def slots(self) -> list[Slot]:
        """The adapted leaves, in the order of the parameter tree.

        Raises:
            PlanError: for everything that does not fit; see `plan`.
        """
        chosen: dict[str, dict[tuple[int, ...], tuple[Candidate, Rule]]] = {}
        for candidate in self.candidates:
            rule = self._match(candidate)
            if rule is not None:
                leaf = chosen.setdefault(candidate.leaf.path, {})
                leaf[candidate.index] = candidate, rule
        self._check_counts()
        leaves = self.leaves
        out = [s for path, on in chosen.items() for s in self._leaf(leaves[path], on)]
        check_ties(self.config, out, leaves)
        return out

    def _rules(self) -> list[Rule]:
        if self.config.rules is not None:
            return [self.config.resolve(rule) for rule in self.config.rules]
        for pattern in _USUAL_TARGETS:
            rule = self.config.resolve(Rule(pattern))
            if any(matches(rule, candidate) for candidate in self.candidates):
                return [rule]
        linear = [
            leaf.path for leaf in self.leaves.values() if is_linear(leaf, self.rows)
        ]
        raise PlanError(
            "`targets` is None, and the names of these parameters are those of no "
            "architecture with a usual choice.\n"
            + listing("candidates", linear[:8], len(linear))
            + "\nSay what to adapt, e.g. LoraConfig(targets='all-linear')."
        )

    def _match(self, candidate: Candidate) -> Rule | None:
        if any(matches(rule, candidate) for rule in self.excluded):
            return None
        layers = self.config.layers
        if layers is not None and candidate.layer not in layers:
            return None
        first = None
        for i, rule in enumerate(self.rules):
            if rule.pattern == ALL_LINEAR:
                hit = is_linear(candidate.leaf, self.rows)
            else:
                hit = matches(rule, candidate)
            if hit and first is None:
                first = rule
                self.counts[i] += max(1, len(rule.parts))
            elif hit:
                self.shadowed[i] += 1
        return first

    def _check_counts(self) -> None:
        for rule, count, shadowed in zip(
            self.rules, self.counts, self.shadowed, strict=True
        ):
            if rule.expect is not None and count != rule.expect:
                raise PlanError(
                    f"The target {rule.pattern!r} matches {count} sites, and "
                    f"`expect` = {rule.expect} was asked for."
                )
            if count == 0:
                raise PlanError(self._nothing(rule.pattern, shadowed))

    def _nothing(self, pattern: str, shadowed: int) -> str:
        paths = [candidate.path for candidate in self.candidates]
        if shadowed:
            return (
                f"The target {pattern!r} matches {shadowed} sites, and rules before it "
                "take them all: the first match wins. Put it first, or drop it."
            )
        if any(Rule(pattern).matches(path) for path in paths):
            return (
                f"Every path that the target {pattern!r} matches is left out by "
                f"`exclude` = {self.config.exclude} or `layers` = {self.config.layers}."
            )
        hint = ""
        suffix = rf".*/{pattern}"
        if any(Rule(suffix).matches(path) for path in paths):
            hint = f"\nTo match at any depth:  LoraConfig(targets=r{suffix!r})"
        elif any(Rule(rf"{suffix}/kernel").matches(path) for path in paths):
            hint = f"\nPaths end in the leaf:  LoraConfig(targets=r'{suffix}/kernel')"
        return (
            "`targets` matched no parameter.\n"
            f"  pattern  {pattern}          (whole path, re.fullmatch)\n"
            + listing("closest", closest(pattern, paths), len(paths))
            + hint
        )

    def _leaf(
        self,
        leaf: Leaf,
        sites: Mapping[tuple[int, ...], tuple[Candidate, Rule]],
    ) -> list[Slot]:
        """What is adapted of one leaf: all of it, or some parts."""
        dtype = self.dtypes[leaf.path]
        if not jnp.issubdtype(dtype, jnp.floating):
            raise PlanError(
                not_floating(leaf.path, dtype) + " Leave it out with `exclude`."
            )
        rules = [rule for _, rule in sites.values()]
        used = find_role(leaf, _agreed("tie", rules, leaf))
        role = with_batch(used, leaf, _agreed("batch", rules, leaf))
        if _agreed("dora", rules, leaf):
            if role.groups > 1:
                raise PlanError(
                    f"{leaf.path!r} is the kernel of a grouped convolution, for which "
                    "DoRA is not defined here. Give it a rule with {'dora': False}."
                )
            role = dataclasses.replace(role, kind="dora")
        check_summed(used, role, bias=self.config.lora_bias)
        groups: dict[Role, dict[tuple[int, ...], tuple[Candidate, Rule]]] = {}
        for index, (candidate, rule) in sites.items():
            for own, part_rule in roles_of_parts(role, leaf, rule, candidate.path):
                groups.setdefault(own, {})[index] = candidate, part_rule
        check_names(list(groups))
        return [self._slot(leaf, own, group) for own, group in groups.items()]

    def _slot(
        self,
        leaf: Leaf,
        role: Role,
        sites: Mapping[tuple[int, ...], tuple[Candidate, Rule]],
    ) -> Slot:
        every = tuple(
            self._site(leaf, role, *sites[index]) if index in sites else None
            for index in part_indices(role, leaf.shape)
        )
        check_frozen(every)
        return Slot(
            role,
            leaf.shape,
            self.dtypes[leaf.path],
            every,
            bias=self._has_bias(role),
        )

    def _has_bias(self, role: Role) -> bool:
        """Whether B has a bias; a lookup has no place for one."""
        if not self.config.lora_bias:
            return False
        for wrong, what in (
            (role.lookup, "is looked up"),
            (role.kind == "dora", "is DoRA"),
            (
                len(role.batch) > role.stack,
                "has factors for each expert or batch entry",
            ),
        ):
            if wrong:
                raise PlanError(
                    f"`lora_bias` gives B a bias, which {role.path!r} cannot have: it "
                    f"{what}. Leave one of the two out."
                )
        return True

    def _site(self, leaf: Leaf, role: Role, candidate: Candidate, rule: Rule) -> Site:
        assert rule.rank is not None and rule.alpha is not None
        part = tuple(zip(role.stacked, candidate.index, strict=True))
        shape, most = role.layer_shape(leaf.shape), max_rank(role, leaf.shape)
        if rule.rank > most:
            lower = f"{{'rank': {most}}}"
            if role.part is not None:
                lower = f"{{'parts': {{{role.part.name!r}: {{..., 'rank': {most}}}}}}}"
            raise PlanError(
                f"`rank` = {rule.rank} exceeds {most}, the rank that "
                f"{named(candidate.path, role.suffix)!r} of shape {shape} can have "
                f"(in {role.inputs}, out {role.outputs}"
                + (f" in {role.groups} groups). " if role.groups > 1 else "). ")
                + "Lower `rank` for this site: "
                f"targets={{{candidate.path!r}: {lower}, ...}}"
            )
        init = True if rule.init is None else rule.init
        name = named(candidate.path, role.suffix)
        method = check_method(init, name, rule.rank, rule.alpha, most)
        vectors = (role.kind == "dora") + self._has_bias(role)
        return Site(
            path=candidate.path,
            leaf=leaf.path,
            part=part,
            use=role.use,
            shape=shape,
            role=role,
            rank=rule.rank,
            alpha=rule.alpha,
            scale=self.config.scale(rule.rank, rule.alpha),
            rule=rule.pattern,
            init=init,
            dropout=rule.dropout or 0.0,
            trainable=parameters(role, leaf.shape, rule.rank, vectors, method.freezes),
            frozen=method.freezes,
        )


def _agreed(name: str, rules: Sequence[Rule], leaf: Leaf) -> Any:
    """What all rules of a leaf's layers say."""
    found = {getattr(rule, name) for rule in rules}
    if len(found) > 1:
        raise PlanError(
            f"Rules disagree about `{name}` for the layers of {leaf.path!r}, which "
            f"share one array: {', '.join(sorted(map(repr, found)))}. Give all of them "
            "the same."
        )
    return found.pop()
