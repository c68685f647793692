"""Which leaves a configuration takes, and in which role."""

import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from .. import _paths
from .._config import ALL_LINEAR, LoraConfig, Rule
from .._errors import PlanError, closest, listing, shorten
from ..adapters import Role, named, not_floating
from ..structure import Use
from ..transform import Consumer, Leaf
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


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A path that rules are matched against: a leaf, or a layer of a stacked one."""

    path: str
    leaf: Leaf
    index: tuple[int, ...]  # into the stacked axes
    layer: int | None


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
        self.candidates = [c for leaf in leaves.values() for c in _candidates(leaf)]
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
        return Slot(
            role,
            leaf.shape,
            self.dtypes[leaf.path],
            tuple(
                self._site(leaf, role, *sites[index]) if index in sites else None
                for index in part_indices(role, leaf.shape)
            ),
            bias=self._has_bias(role),
        )

    def _has_bias(self, role: Role) -> bool:
        """Whether B has a bias; a lookup has no place for one."""
        if not self.config.lora_bias:
            return False
        for wrong, what in (
            (role.lookup, "is looked up"),
            (role.kind == "dora", "is DoRA"),
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
            init=True if rule.init is None else rule.init,
            dropout=rule.dropout or 0.0,
            trainable=parameters(role, leaf.shape, rule.rank, vectors),
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


def max_rank(role: Role, shape: Sequence[int]) -> int:
    """The largest rank that a product over these axes can have, in a group."""
    d_in = d_out = 1
    for n in role.sizes(shape, role.inputs):
        d_in *= n
    for n in role.sizes(shape, role.outputs):
        d_out *= n
    return min(d_in, d_out // role.groups)


def is_linear(leaf: Leaf, rows: frozenset[int]) -> bool:
    """What `"all-linear"` takes: a weight that a product consumes, but no output head.

    The head is a product whose outputs are as many as a looked-up table has rows and
    make a result of the function by themselves. `rows` is from `table_rows`.
    """
    products = leaf.of_kind("product")
    if not any("in" in c.axes and "out" in c.axes for c in products):
        return False
    return not is_head(leaf, rows)


def is_head(leaf: Leaf, rows: frozenset[int]) -> bool:
    """Whether a product with the leaf makes one output for each row of a table."""
    return any(
        consumer in leaf.heads and leaf.size(consumer, "out") in rows
        for consumer in leaf.of_kind("product")
    )


def table_rows(leaves: Mapping[str, Leaf]) -> frozenset[int]:
    """Numbers of rows of the tables that the function looks up."""
    return frozenset(
        leaf.size(consumer, "in")
        for leaf in leaves.values()
        for consumer in leaf.of_kind("lookup")
    )


def find_role(leaf: Leaf, tie: str | None) -> Role:
    """The roles of a leaf's axes.

    Raises:
        PlanError: if nothing multiplies by the leaf, if its uses disagree, or if it is
            tied and `tie` does not say which use is meant.
    """
    products = [c for c in leaf.of_kind("product") if "in" in c.axes or c.problem]
    lookups = leaf.of_kind("lookup")
    if not products and not lookups:
        raise PlanError(_dead(leaf))
    for consumer in (*products, *lookups):
        if consumer.problem:
            raise PlanError(
                f"The axes of {leaf.path!r} of shape {leaf.shape} have no single role: "
                f"{consumer.problem}, at {consumer.source}."
            )
    if leaf.stopped:
        warnings.warn(
            f"{leaf.path!r} goes through `stop_gradient`: its adapter will get no "
            "gradient there.",
            stacklevel=6,
        )
    kinds = {(c.axes, c.groups): c for c in products}
    if lookups and products:
        if tie is None:
            raise PlanError(_tied(leaf, lookups[0], products[0]))
        if tie == "head":
            return _role(leaf, products[0], use="head")
        lookup = "lookup" if tie == "lookup" else None
        return _role(leaf, lookups[0], use=lookup, table=True)
    if lookups:
        return _role(leaf, lookups[0], table=True)
    if len(kinds) > 1 and tie != "shared":
        lines = [f"in {_where(c, 'in')} at {c.source}" for c in kinds.values()]
        raise PlanError(
            f"{leaf.path!r} of shape {leaf.shape} is multiplied in several ways:\n"
            + listing("uses", lines)
            + "\nTo adapt the weight itself, as seen by all of them, say "
            f"targets={{{leaf.path!r}: {{'tie': 'shared'}}, ...}}"
        )
    role = _role(leaf, products[0])
    if not role.outputs:
        raise PlanError(
            f"{leaf.path!r} of shape {leaf.shape} is multiplied as a vector, which has "
            "no low-rank form. Leave it out of `targets`."
        )
    return role


def _role(
    leaf: Leaf, consumer: Consumer, use: Use | None = None, table: bool = False
) -> Role:
    batch, known = _where(consumer, "batch"), stacks_of(leaf)
    stacks = tuple(axis for axis in batch if axis in known)
    rest = tuple(axis for axis in batch if axis not in known)
    return Role(
        path=leaf.path,
        inputs=_where(consumer, "in"),
        outputs=_where(consumer, "out"),
        batch=stacks + rest,
        stack=len(stacks),
        lookup=table,
        use=use,
        groups=consumer.groups,
    )


def stacks_of(leaf: Leaf) -> list[int]:
    """The axes that every use of a leaf reads a layer at a time."""
    uses = [consumer.axes for consumer in leaf.consumers if consumer.axes]
    return sorted(
        axis for axis in leaf.stacks if all(axes[axis] == "batch" for axes in uses)
    )


def _where(consumer: Consumer, role: str) -> tuple[int, ...]:
    return tuple(i for i, r in enumerate(consumer.axes) if r == role)


_BUILT = (
    " To build the adapted weight there, declare its axes, roles={{'{path}': "
    "{{'inputs': ..., 'outputs': ...}}}}, and tell `adapt` to `materialize`."
)


def _dead(leaf: Leaf) -> str:
    others = sorted({c.primitive for c in leaf.of_kind("other")})
    used = f"only {shorten(others)} reads it" if others else "nothing reads it"
    reasons = sorted({c.problem for c in leaf.of_kind("other") if c.problem})
    used += "".join(f" ({reason})" for reason in reasons)
    return (
        f"{leaf.path!r} of shape {leaf.shape} is a target, but no product or lookup of "
        f"the function uses it: {used}. Leave it out of `targets`, or plan on a "
        "function that uses it." + (_BUILT.format(path=leaf.path) if others else "")
    )


def _tied(leaf: Leaf, lookup: Consumer, product: Consumer) -> str:
    return (
        f"{leaf.path!r} of shape {leaf.shape} is tied: it is looked up and also "
        f"multiplied by, at {product.source}.\n"
        "Choose what the adapter changes:\n"
        f"  targets={{{leaf.path!r}: {{'tie': 'shared'}}}}   the table, seen by both\n"
        f"  targets={{{leaf.path!r}: {{'tie': 'lookup'}}}}   the lookup alone\n"
        f"  targets={{{leaf.path!r}: {{'tie': 'head'}}}}     the product alone"
    )


def _candidates(leaf: Leaf) -> Iterable[Candidate]:
    stacks = stacks_of(leaf)
    role = Role(leaf.path, (), (), tuple(stacks), len(stacks))
    for index in part_indices(role, leaf.shape):
        path = leaf.path
        # From the innermost stack out, so that depths stay right as indices go in.
        for axis, i in sorted(
            zip(stacks, index, strict=True), key=lambda x: (-leaf.stacks[x[0]], -x[0])
        ):
            path = _paths.insert_index(path, leaf.stacks[axis], i)
        yield Candidate(path, leaf, index, _layer(path, index))


def _layer(path: str, index: tuple[int, ...]) -> int | None:
    """The layer's number: its index in a stack, or the first number behind a name."""
    if index:
        return index[0]
    parts = path.split("/")
    for name, part in itertools.pairwise(parts):
        if part.isdigit() and not name.isdigit():
            return int(part)
    return None


def matches(rule: Rule, candidate: Candidate) -> bool:
    """Whether a rule takes a candidate, by its own path or that of its stack."""
    return rule.matches(candidate.path) or (
        bool(candidate.index) and rule.matches(candidate.leaf.path)
    )
