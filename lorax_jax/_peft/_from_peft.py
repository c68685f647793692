"""`LoraConfig`'s rules from PEFT's fields.

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
from ._copies import beside_from_peft
from ._fields import (
    Ranks,
    Targets,
    check_fields,
    flag,
    layer_replication,
    number,
)
from ._inits import read_init
from ._modules import ALL_LINEAR, LAYERS, WHAT, group, is_linear
from ._parameters import Parameters, check_owners
from ._patterns import endings

# The modules that PEFT adapts when it is told nothing: query and value, under the names
# that architectures give them. The first that a model has any of are taken.
USUAL = (
    ("q_proj", "v_proj"),
    ("c_attn",),
    ("query", "value"),
    ("query_key_value",),
    ("qkv_proj",),
)


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
    check_fields(config, WHAT)
    modules = list(names.expand(LAYERS))
    config = _told(config, modules)
    ranks, chosen = Ranks(config, WHAT), Targets(config, WHAT)
    parameters = Parameters(config, WHAT)
    result: dict[str, Any] = {
        "rank": ranks.rank,
        "alpha": ranks.alpha,
        "rslora": ranks.rslora,
        "dropout": number(config, "lora_dropout", WHAT),
        "dora": flag(config, "use_dora", WHAT),
        "lora_bias": flag(config, "lora_bias", WHAT),
        "init": read_init(config, WHAT),
        "layer_replication": layer_replication(config, WHAT),
        "targets": None,
    }
    picked = [] if chosen.targets is None else _picked(chosen, modules, names)
    result |= beside_from_peft(config, {m.name for m in picked}, names, WHAT)
    if chosen.targets is None:
        return result
    bare = [t for t in names.tensors(LAYERS) if parameters(t.name)]
    _check_parameters(parameters, bare, names)
    check_owners([m.name for m in picked], [t.name for t in bare], WHAT)
    _check_excluded(chosen, [*(m.name for m in modules), names.head])
    if chosen.all_linear:
        # PEFT's "all-linear" takes no convolutions and no bare parameters; ours does.
        left = [m for m in modules if chosen.excludes(m.name) or m.layout == "conv"]
        left += [t for t in names.expand_parameters(LAYERS) if not parameters(t.name)]
        _check_patterns(ranks, [*picked, *bare])
        special = [m for m in (*picked, *bare) if _overrides(ranks, m.name)]
        result["exclude"] = tuple(group(dict.fromkeys(left)))
        result["targets"] = _targets(ranks, special) | {ALL_LINEAR: {}}
        return result
    tied = _tied(config, chosen, ranks, names)
    if chosen.targets or not bare:
        known = [*(m.name for m in modules), names.head]
        _check_targets(chosen, known, picked or tied)
    _check_patterns(ranks, [*picked, *bare], *([names.head] if tied else []))
    result["targets"] = _targets(ranks, [*picked, *bare]) | tied
    return result


def _told(config: Mapping[str, Any], modules: Sequence[Module]) -> Mapping[str, Any]:
    """The configuration with its targets written out, where it leaves them to PEFT."""
    if config.get("target_modules") is not None:
        return config
    if config.get("target_parameters"):
        # A saved configuration has the modules that PEFT chose: here it chose none.
        if config.get("inference_mode") is True:
            return {**config, "target_modules": []}
        raise ConfigError(
            f"{WHAT} has `target_parameters` and no `target_modules`, and PEFT then "
            "adapts query and value too, in the architectures that it knows. Write "
            "`target_modules`: [] for the parameters alone, or name the modules."
        )
    narrowed = ("rank_pattern", "alpha_pattern", "exclude_modules")
    if not any(config.get(f) for f in narrowed) and not _has_layers(config):
        return config
    for usual in USUAL:
        chosen = Targets({"target_modules": list(usual)}, WHAT)
        if any(chosen(module.name) for module in modules):
            return {**config, "target_modules": list(usual)}
    raise ConfigError(
        f"{WHAT} narrows the targets and names none, and `names` has none of the "
        "modules that PEFT usually adapts. Write `target_modules` out."
    )


def _has_layers(config: Mapping[str, Any]) -> bool:
    return config.get("layers_to_transform") not in (None, [])


def _picked(chosen: Targets, modules: Sequence[Module], names: NameMap) -> list[Module]:
    if not chosen.all_linear:
        return [m for m in modules if chosen(m.name)]
    return [m for m in modules if is_linear(m, names) and not chosen.excludes(m.name)]


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
            f"{WHAT} adapts {table!r} and {names.head!r} separately, and they are one "
            "weight. Set `ensure_weight_tying` to true for one adapter of both, or "
            "name one of them."
        )
    if shared and config.get("use_dora"):
        raise ConfigError(
            f"{WHAT} has one adapter for {table!r} and {names.head!r}, and by "
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
            f"{WHAT} has the targets {shorten(shown)}, which take no module of "
            f"`names`. Closest: {shorten(_near(shown[0], known))}."
        )


def _check_excluded(chosen: Targets, known: Sequence[str]) -> None:
    """PEFT says nothing of an entry that takes none, or one that only holds others."""
    excluded = chosen.excluded or ()
    entries = [excluded] if isinstance(excluded, str) else sorted(excluded)
    for entry in entries:
        field = entry if isinstance(excluded, str) else [entry]
        one = Targets({"exclude_modules": field}, WHAT)
        if not any(map(one.excludes, known)):
            raise ConfigError(
                f"{WHAT} has {entry!r} in `exclude_modules`, which takes no module of "
                f"`names`, so it leaves nothing out. Closest: "
                f"{shorten(_near(entry, known))}. Correct it, or drop it."
            )


def _check_parameters(
    parameters: Parameters, bare: Sequence[Module], names: NameMap
) -> None:
    for entry in sorted(parameters.names):
        one = Parameters({"target_parameters": [entry]}, WHAT)
        if not any(one(tensor.name) for tensor in bare):
            known = [tensor.name for tensor in names.expand_parameters(1)]
            raise ConfigError(
                f"{WHAT} has {entry!r} in `target_parameters`, which takes no tensor "
                f"of `names`. Closest: {shorten(_near(entry, known))}."
            )


def _check_patterns(ranks: Ranks, picked: Sequence[Module], *more: str) -> None:
    modules = [*(module.name for module in picked), *more]
    for field, patterns in (("rank", ranks.ranks), ("alpha", ranks.alphas)):
        for pattern in patterns:
            if not any(ranks.takes(pattern, module) for module in modules):
                raise ConfigError(
                    f"{WHAT} has the `{field}_pattern` {pattern!r}, which takes no "
                    "adapted module, so the ranks would not be those it means. "
                    f"Closest: {shorten(_near(pattern, modules))}."
                )


def _near(wanted: str, modules: Iterable[str]) -> list[str]:
    few = {re.sub(r"\.\d+(?=\.)", ".0", module) for module in modules}
    return closest(wanted, sorted(few), 3)
