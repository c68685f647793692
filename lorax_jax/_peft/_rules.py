"""`LoraConfig`'s rules from PEFT's fields, and back.

PEFT's patterns are about module names, ours about paths, and a name table connects the
two. Neither side's regexes can be rewritten as the other's, so both directions ask
every module of a model with many layers, and write down the answers: what came out the
same for all layers becomes one rule again.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._errors import CheckpointError, ConfigError, closest, shorten
from .._names import Module, NameMap
from ._copies import beside_from_peft, beside_to_peft
from ._fields import DEFAULTS, Ranks, Targets, check_fields, flag, number
from ._modules import LAYERS, group, takes
from ._patterns import condense, endings, short_targets

ALL_LINEAR = "all-linear"

_WHAT = "The PEFT configuration"


def from_peft(config: Mapping[str, Any], names: NameMap) -> dict[str, Any]:
    """The arguments of the `LoraConfig` that adapts what PEFT would adapt.

    Args:
        config: the fields of an `adapter_config.json`.
        names: the model's name table.

    Returns:
        Keyword arguments of `LoraConfig`; `targets` is a dict from regexes of whole
        paths to overrides.

    Raises:
        ConfigError: if the fields ask for more than LoRA or are malformed, or if a
            target or pattern takes no module of the table.
    """
    try:
        return _from_peft(config, names)
    except CheckpointError as error:  # here it is no file that is wrong
        raise ConfigError(str(error)) from None


def _from_peft(config: Mapping[str, Any], names: NameMap) -> dict[str, Any]:
    check_fields(config, _WHAT, trained=False)
    ranks, chosen = Ranks(config, _WHAT), Targets(config, _WHAT)
    init = config.get("init_lora_weights", True)
    result: dict[str, Any] = {
        "rank": ranks.rank,
        "alpha": ranks.alpha,
        "rslora": ranks.rslora,
        "dropout": number(config, "lora_dropout", _WHAT),
        "dora": flag(config, "use_dora", _WHAT),
        "lora_bias": flag(config, "lora_bias", _WHAT),
        "init": init.lower() if isinstance(init, str) else init is not False,
        "targets": None,
    }
    modules = list(names.expand(LAYERS))
    picked = [] if chosen.targets is None else _picked(chosen, modules, names)
    result |= beside_from_peft(config, {m.name for m in picked}, names, _WHAT)
    if chosen.targets is None:
        return result
    if chosen.all_linear:
        # PEFT's "all-linear" takes no convolutions, and ours does.
        excluded = {
            m: None for m in modules if chosen.excludes(m.name) or m.layout == "conv"
        }
        _check_patterns(ranks, picked)
        special = [m for m in picked if _overrides(ranks, m.name)]
        result["exclude"] = tuple(group(excluded))
        result["targets"] = _targets(ranks, special) | {ALL_LINEAR: {}}
        return result
    tied = _tied(config, chosen, ranks, names)
    _check_targets(chosen, [*(m.name for m in modules), names.head], picked or tied)
    _check_patterns(ranks, picked, *([names.head] if tied else []))
    result["targets"] = _targets(ranks, picked) | _tied(config, chosen, ranks, names)
    return result


def _picked(chosen: Targets, modules: Sequence[Module], names: NameMap) -> list[Module]:
    if not chosen.all_linear:
        return [m for m in modules if chosen(m.name)]
    return [m for m in modules if _linear(m, names) and not chosen.excludes(m.name)]


def _targets(ranks: Ranks, picked: Sequence[Module]) -> dict[str, dict[str, Any]]:
    values = {m: tuple(_overrides(ranks, m.name).items()) for m in picked}
    return {pattern: dict(overrides) for pattern, overrides in group(values).items()}


def _overrides(ranks: Ranks, module: str) -> dict[str, Any]:
    rank, alpha, _ = ranks(module)
    found = {"rank": rank, "alpha": alpha}
    return {key: v for key, v in found.items() if v != getattr(ranks, key)}


def _tied(
    config: Mapping[str, Any], chosen: Targets, ranks: Ranks, names: NameMap
) -> dict[str, dict[str, Any]]:
    """The rule of an embedding that a head shares, which no module of the table is."""
    if names.tied is None or names.module_path(names.head) is not None:
        return {}
    table = names.module(names.tied)
    lookup = table is not None and chosen(table)
    head = chosen(names.head)
    if not lookup and not head:
        return {}
    shared = bool(config.get("ensure_weight_tying"))
    if lookup and head and not shared:
        raise ConfigError(
            f"{_WHAT} adapts {table!r} and {names.head!r} separately, and they are one "
            "weight. Set `ensure_weight_tying` to true for one adapter of both, or "
            "name one of them."
        )
    if shared and config.get("use_dora"):
        raise ConfigError(
            f"{_WHAT} has one adapter for {table!r} and {names.head!r}, and by "
            "`use_dora` magnitudes for each. Leave one of the two out of the targets."
        )
    tie = "shared" if shared else "lookup" if lookup else "head"
    module = table if tie != "head" else names.head
    return {re.escape(names.tied): {"tie": tie, **_overrides(ranks, module or "")}}


def _check_targets(chosen: Targets, known: Sequence[str], picked: Any) -> None:
    lost: list[str] = []
    if isinstance(chosen.targets, str):
        entries = [chosen.targets]
    else:
        entries = sorted(chosen.targets or ()) or ["(none)"]
        ends = {ending for module in known for ending in endings(module)}
        lost = [e for e in entries if e not in ends and e not in known]
    if lost or not picked:
        shown = lost or entries
        raise ConfigError(
            f"{_WHAT} has the targets {shorten(shown)}, which take no module of "
            f"`names`. Closest: {shorten(_near(shown[0], known))}."
        )


def _check_patterns(ranks: Ranks, picked: Sequence[Module], *more: str) -> None:
    modules = [*(module.name for module in picked), *more]
    for field, patterns in (("rank", ranks.ranks), ("alpha", ranks.alphas)):
        for pattern in patterns:
            if not any(ranks.takes(pattern, module) for module in modules):
                raise ConfigError(
                    f"{_WHAT} has the `{field}_pattern` {pattern!r}, which takes no "
                    "adapted module, so the ranks would not be those it means. "
                    f"Closest: {shorten(_near(pattern, modules))}."
                )


def _near(wanted: str, modules: Iterable[str]) -> list[str]:
    few = {re.sub(r"\.\d+(?=\.)", ".0", module) for module in modules}
    return closest(wanted, sorted(few), 3)


def _linear(module: Module, names: NameMap) -> bool:
    """Whether PEFT's "all-linear" takes a module: a matrix, and not the head.

    A table does not say which of its `"same"` tensors are matrices. Flax calls those
    `kernel`.
    """
    named = module.path.split("/")[-1] == "kernel"
    matrix = module.layout == "linear" or (module.layout == "same" and named)
    return matrix and module.name != names.head


def to_peft(config: Any, names: NameMap) -> dict[str, Any]:
    """PEFT's fields for a `LoraConfig`.

    Args:
        config: a `LoraConfig`.
        names: the model's name table.

    Returns:
        What `adapter_config.json` holds: every field that PEFT writes.

    Raises:
        ConfigError: if PEFT cannot express it.
    """
    fields = DEFAULTS | {
        "inference_mode": False,
        "r": config.rank,
        "lora_alpha": plain(config.rank if config.alpha is None else config.alpha),
        "use_rslora": config.rslora,
        "lora_bias": config.lora_bias,
        "init_lora_weights": _init(config.init),
    }
    if config.rules is None:
        fields |= {"lora_dropout": config.dropout, "use_dora": config.dora}
        fields |= beside_to_peft(config, (), names)
        return dict(sorted(fields.items()))
    rules = [config.resolve(rule) for rule in config.rules]
    for name in ("parts", "batch"):
        said = next((rule.pattern for rule in rules if getattr(rule, name)), None)
        if said is not None:
            raise ConfigError(
                f"The rule {said!r} has `{name}`, for which PEFT's configuration has "
                "no word: there a module has one A and one B. Keep the `LoraConfig`; "
                "the adapter can be saved without `names`, or merged."
            )
    fields["lora_dropout"] = _only("dropout", {rule.dropout for rule in rules})
    fields["init_lora_weights"] = _init(_only("init", {rule.init for rule in rules}))
    fields["use_dora"] = _only("dora", {rule.dora for rule in rules})
    catch_all = next((r for r in rules if r.pattern == ALL_LINEAR), None)
    taken: dict[str, Any] = {}
    left: list[str] = []
    odd: list[str] = []
    for module in names.expand(LAYERS):
        rule = _rule(config, rules, names, module)
        if rule is None:
            left.append(module.name)
        elif module.path == names.tied:
            _place_tie(taken, fields, names, module.name, rule)
        else:
            taken[module.name] = rule
        if rule is not None and not _linear(module, names):
            odd.append(module.name)
    if catch_all is not None:
        odd += ["`layers`"] if config.layers is not None else []
        if odd:
            raise ConfigError(
                f"PEFT's 'all-linear' cannot be combined with {shorten(odd)}. Write "
                "the targets out."
            )
        fields["target_modules"] = ALL_LINEAR
        fields["exclude_modules"] = _excluded(config, names)
        fields["r"], fields["lora_alpha"] = catch_all.rank, plain(catch_all.alpha)
    else:
        if not taken:
            patterns = shorten([rule.pattern for rule in rules])
            raise ConfigError(
                f"The targets {patterns} take no path of `names`. Closest: "
                f"{shorten(closest(rules[0].pattern, [e[0] for e in names.entries]))}."
            )
        fields["target_modules"] = sorted(short_targets(taken, left))
    fields |= beside_to_peft(config, taken, names)
    ranks = {module: rule.rank for module, rule in taken.items()}
    alphas = {module: plain(rule.alpha) for module, rule in taken.items()}
    fields["rank_pattern"] = condense(ranks, fields["r"])
    fields["alpha_pattern"] = condense(alphas, fields["lora_alpha"])
    return dict(sorted(fields.items()))


def _rule(config: Any, rules: Sequence[Any], names: NameMap, module: Module) -> Any:
    """The first rule that takes a module, as `plan` would find it."""
    if any(_hit(pattern, module, names) for pattern in config.exclude):
        return None
    if config.layers is not None and module.layer not in config.layers:
        return None
    return next((rule for rule in rules if _hit(rule.pattern, module, names)), None)


def _hit(pattern: str, module: Module, names: NameMap) -> bool:
    if pattern == ALL_LINEAR:  # ours, which takes convolutions too
        return _linear(module, names) or module.layout == "conv"
    return takes(pattern, module)


def _place_tie(
    taken: dict[str, Any], fields: dict[str, Any], names: NameMap, table: str, rule: Any
) -> None:
    if rule.tie is None:
        raise ConfigError(
            f"{rule.pattern!r} takes {names.tied!r}, which the head shares. Say which "
            "use is adapted: `tie='shared'`, 'lookup' or 'head'."
        )
    fields["ensure_weight_tying"] = rule.tie == "shared"
    if rule.tie in ("shared", "lookup"):
        taken[table] = rule
    if rule.tie in ("shared", "head"):
        taken[names.head] = rule


def _excluded(config: Any, names: NameMap) -> list[str] | None:
    hit, free = [], []
    for module in names.expand(LAYERS):
        out = any(_hit(pattern, module, names) for pattern in config.exclude)
        (hit if out else free).append(module.name)
    return sorted(short_targets(hit, free)) or None


def _only(field: str, values: set[Any]) -> Any:
    if len(values) > 1:
        raise ConfigError(
            f"The rules give `{field}` the values {sorted(map(str, values))}; PEFT has "
            "one for all modules. Give all rules the same."
        )
    return values.pop()


def _init(init: Any) -> Any:
    return True if init in (True, "kaiming") else False if init == "random" else init


def plain(value: float) -> int | float:
    """A number as JSON should show it: 16, not 16.0."""
    return int(value) if float(value).is_integer() else float(value)
