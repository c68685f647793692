"""What to adapt, and how: `LoraConfig`."""

import dataclasses
import math
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from . import _peft
from ._errors import ConfigError
from ._json import read_json
from ._names import NameMap
from ._parts import PartRule
from ._ranges import checked_ranges
from ._rule import (
    Rule,
    Tie,
    check_alpha,
    check_dropout,
    check_flag,
    check_rank,
    check_regex,
    check_tie,
    read_rules,
)

Bias = Literal["none", "all", "lora_only"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    r"""Which weights are adapted, at which rank and scale, starting how.

    A weight $W$ matched by a target becomes $W + s\,A B$ with $A$ of `rank` columns and
    $s = \alpha / r$, or $\alpha / \sqrt r$ with `rslora`.

    The configuration is data: hashable, comparable, and knows nothing of any model. A
    path is matched whole (`re.fullmatch`), the first matching rule wins, and layers of
    a stack can be matched by their virtual paths (`layers/3/attn/q_proj/kernel`) as
    well as by the path of the stacked leaf (`layers/attn/q_proj/kernel`).

    One leaf may hold several weights, and a rule says which of them are adapted. Axes
    count on the leaf, those of a stack included:

    - `parts` names boxes of the leaf, each with an A and a B of its own:
      `{".*/qkv": {"parts": {"q": {1: (0, 64)}, "v": {1: (128, 192), "rank": 4}}}}`
      takes the columns 0 to 63 and 128 to 191. Where heads interleave, the axis is
      viewed as several first. With 2 heads of 4 queries, a key and a value each,
      `{1: {"split": (2, 6, 16), "take": (None, (0, 4), None)}}` are the queries.
    - `batch` gives A and B an entry for each index of some axes, though the model does
      not run along them in parallel: `{".*/kv_einsum": {"batch": 0}}` gives the keys
      and the values in a kernel `(2, heads, in, size)` an adapter each.

    Args:
        targets: a regex, several, a dict from regex to overrides (`rank`, `alpha`,
            `init`, `dropout`, `tie`, `dora`, `expect`, `batch`, `parts`),
            `"all-linear"` (every weight that a matrix product consumes, except the
            output head), or `None` for the query and value projections of an
            architecture whose parameter names are known.
        rank: columns of A, rows of B.
        alpha: numerator of the scale; `None` takes each rule's own rank, so `s` is 1
            (or `sqrt(rank)` with `rslora`).
        exclude: regexes of paths that no target takes.
        rslora: divide `alpha` by the square root of the rank.
        dropout: probability of dropping an input of A. Acts only when `bind` is given
            a `key`.
        init: how A and B start. All but `False` start where the base is.

            - At random: `True` or `"kaiming"` (A uniform, B zero), `"gaussian"` (A
              normal, B zero), `"orthogonal"` (both random, of product zero), or `False`
              or `"random"` (both random: the adapted function differs from the base at
              once). Embeddings have A zero and B normal.
            - From the weight: `"pissa"` (its leading singular directions),
              `"pissa_niter_N"` (the same, randomized, with N iterations), `"olora"`
              (its QR decomposition), `"mica"` (B the output directions that it uses
              least, never trained).
            - From what `prepare` gathers: `"eva"` (directions along which inputs vary
              most), `"corda"` or `"corda_ipm"` and `"corda_kpm"` (directions of the
              weight that inputs use most, or least), `"lora_ga"` (directions of the
              gradient).

            Options of a method are an instance in place of the name, such as
            `initializers.LoraGa(scale="unit")`. Starting factors are kept in the
            adapter, and the base is never changed.
        layers: indices of the layers to adapt; `None` adapts all.
        tie: for a tied embedding: `"shared"` adapts the table, seen by the lookup and
            the head, `"lookup"` and `"head"` adapt one of its uses.
        dora: give every output a trained magnitude: DoRA. A rule may say otherwise.
        lora_bias: give B a bias: the product gains `s` times it.
        bias: which biases of the model are trained beside the adapter: `"none"`,
            `"all"` leaves called `bias`, or `"lora_only"`, those beside an adapted
            weight.
        whole: regexes of leaves that are trained whole, such as a new head.
        token_rows: rows of an embedding that are trained: their numbers, or a dict from
            a regex of tables to the numbers.
        layer_replication: ranges of layers that the model was made of by `replicate`,
            for PEFT to make it again. It repeats nothing: `plan` checks that the
            parameters are so, and finds it out by itself where layers are stacked.
        dtype: storage dtype of everything that is trained.

    Raises:
        ConfigError: on a bad regex, rank, dropout or override.

    Example:
        >>> config = LoraConfig(targets=r".*/(q|v)_proj/kernel", rank=16, alpha=32)
        >>> config.scale(16, 32)
        2.0
        >>> LoraConfig(targets={r".*/mlp/.*": {"rank": 4}, "all-linear": {}}).rules[0]
        ... # doctest: +ELLIPSIS
        Rule(pattern='.*/mlp/.*', rank=4, ...)

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
        https://arxiv.org/abs/2106.09685
        Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
        2023. https://arxiv.org/abs/2312.03732
    """

    targets: Any = None
    rank: int = 8
    alpha: float | None = None
    _: dataclasses.KW_ONLY
    exclude: Any = ()
    rslora: bool = False
    dropout: float = 0.0
    init: Any = True
    layers: Any = None
    tie: Tie | None = None
    dora: bool = False
    lora_bias: bool = False
    bias: Bias = "none"
    whole: Any = ()
    token_rows: Any = ()
    layer_replication: Any = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        check_rank(self.rank, "rank")
        check_dropout(self.dropout, "dropout")
        check_tie(self.tie, "tie")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(
                f"`bias` = {self.bias!r}; one of 'none', 'all', 'lora_only' is meant."
            )
        for name in ("rslora", "dora", "lora_bias"):
            check_flag(getattr(self, name), name)
        if self.alpha is not None:
            check_alpha(self.alpha, "alpha")
        dtype = _dtype(self.dtype)
        # Normalized to hashable values; `object.__setattr__` is how a frozen dataclass
        # sets its own fields.
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "targets", read_rules(self.targets))
        object.__setattr__(self, "exclude", _patterns("exclude", self.exclude))
        object.__setattr__(self, "whole", _patterns("whole", self.whole))
        object.__setattr__(self, "token_rows", _token_rows(self.token_rows))
        object.__setattr__(self, "layers", _indices(self.layers))
        ranges = self.layer_replication
        if ranges is not None:
            ranges = checked_ranges(ranges, "`layer_replication`")
        object.__setattr__(self, "layer_replication", ranges)

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any] | str | os.PathLike, names: Any
    ) -> "LoraConfig":
        """The configuration that adapts what PEFT's would adapt, at the same ranks.

        `rank_pattern` and `alpha_pattern` become overrides of the rules they concern,
        so a target and its rank cannot miss separately.

        Args:
            config: the fields of an `adapter_config.json`, or the folder that holds it.
            names: the model's name table, a `NameMap` or its entries.

        Raises:
            ConfigError: if it asks for what is not known here, naming each such field,
                or if a target or pattern takes no module of `names`.
            CheckpointError: if the folder holds no readable `adapter_config.json`.

        Example:
            >>> names = [("h/{i}/q/kernel", "h.{i}.q.weight", "linear"),
            ...          ("h/{i}/k/kernel", "h.{i}.k.weight", "linear")]
            >>> fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8,
            ...           "target_modules": ["q", "k"], "rank_pattern": {"h.0.k": 2}}
            >>> for rule in LoraConfig.from_peft(fields, names).rules:
            ...     print(rule.pattern, rule.rank)
            h/\\d+/q/kernel None
            h/0/k/kernel 2
            h/\\d+/k/kernel None
        """
        if not isinstance(config, Mapping):
            config = read_json(Path(config) / "adapter_config.json")
        return cls(**_peft.from_peft(config, NameMap.of(names)))

    def to_peft(self, names: Any) -> dict[str, Any]:
        """PEFT's fields for this configuration, as `adapter_config.json` holds them.

        `dtype` has no field there: PEFT trains in float32 unless told otherwise.

        Args:
            names: the model's name table, a `NameMap` or its entries.

        Raises:
            ConfigError: if PEFT has no way to say it, as for a dropout of one rule.

        Example:
            >>> names = [("h/{i}/q/kernel", "h.{i}.q.weight", "linear"),
            ...          ("h/{i}/k/kernel", "h.{i}.k.weight", "linear")]
            >>> fields = LoraConfig(r"h/\\d+/q/kernel", rank=4).to_peft(names)
            >>> fields["target_modules"], fields["r"], fields["lora_alpha"]
            (['q'], 4, 4)
        """
        return _peft.to_peft(self, NameMap.of(names))

    @property
    def rules(self) -> tuple[Rule, ...] | None:
        """The targets, normalized to rules; `None` where none were given."""
        return self.targets

    def scale(self, rank: int, alpha: float) -> float:
        """The multiplier `s` of a site with this `rank` and `alpha`.

        >>> LoraConfig(rslora=True).scale(16, 32)
        8.0
        """
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def resolve(self, rule: Rule) -> Rule:
        """`rule` with the configuration's values where it says nothing."""
        filled = dataclasses.replace(rule, **_numbers(rule, self))
        parts = (dataclasses.replace(p, **_numbers(p, filled)) for p in rule.parts)
        return dataclasses.replace(
            filled,
            # Only now: a part's own rank is its alpha where nobody says another.
            alpha=filled.rank if filled.alpha is None else filled.alpha,
            tie=self.tie if rule.tie is None else rule.tie,
            dora=self.dora if rule.dora is None else rule.dora,
            parts=tuple(
                dataclasses.replace(p, alpha=p.rank if p.alpha is None else p.alpha)
                for p in parts
            ),
        )


# `re` forgets all but its last 512 patterns; a rule for each site may need more.
def _dtype(dtype: Any) -> Any:
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ConfigError(
            f"`dtype` = {dtype} cannot hold trainable factors. Give a floating dtype, "
            "e.g. `dtype=jnp.float32`."
        )
    return found


def _patterns(name: str, patterns: Any) -> tuple[str, ...]:
    if patterns is None:
        return ()
    if not isinstance(patterns, Iterable):
        patterns = [patterns]  # refused below
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in patterns:
        check_regex(name, pattern)
    return patterns


def _token_rows(rows: Any) -> tuple[tuple[str | None, tuple[int, ...]], ...]:
    """Pairs (pattern of a table, its rows); `None` for the only table."""
    if rows is None:
        return ()
    tables = rows.items() if isinstance(rows, Mapping) else [(None, rows)]
    if isinstance(rows, tuple) and rows and isinstance(rows[0], tuple):
        tables = rows  # normalized before, as by `dataclasses.replace`
    out = []
    for pattern, ids in tables:
        if pattern is not None:
            check_regex("token_rows", pattern)
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            ids = [ids]
        ids = tuple(map(_row, ids))
        if len(set(ids)) < len(ids):
            raise ConfigError(f"`token_rows` names a row twice: {list(ids)!r:.60}.")
        if ids:
            out.append((pattern, tuple(sorted(ids))))
    return tuple(out)


def _row(row: Any) -> int:
    try:
        found = -1 if isinstance(row, bool) else operator.index(row)
    except TypeError:
        found = -1
    if found < 0:
        raise ConfigError(
            f"`token_rows` holds {row!r:.60}; numbers of rows are integers from 0 up."
        )
    return found


def _numbers(rule: Rule | PartRule, usual: Any) -> dict[str, Any]:
    """What a rule may say of its own, and what is `usual` where it does not."""
    return {
        name: getattr(usual if getattr(rule, name) is None else rule, name)
        for name in ("rank", "alpha", "init", "dropout")
    }


def _indices(layers: Any) -> tuple[int, ...] | None:
    if layers is None:
        return None
    layers = tuple(layers) if isinstance(layers, Iterable) else (layers,)
    for index in layers:
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ConfigError(
                f"`layers` holds {index!r}; layer indices are integers from 0 up."
            )
    return layers
