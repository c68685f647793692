"""PEFT's fields from `LoraConfig`'s rules; see `_from_peft.py`."""

from collections.abc import Sequence
from typing import Any

from .._errors import CheckpointError, ConfigError, closest, shorten
from .._names import Module, NameMap
from .._ranges import Ranges
from ._copies import beside_to_peft
from ._fields import DEFAULTS
from ._inits import write_init
from ._modules import ALL_LINEAR, LAYERS, WHAT, is_linear, takes
from ._parameters import check_alone, check_owners, short_parameters
from ._patterns import condense, short_targets


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
    try:
        return _to_peft(config, names)
    except CheckpointError as error:  # here there is no file
        raise ConfigError(str(error)) from None


def _to_peft(config: Any, names: NameMap) -> dict[str, Any]:
    fields = DEFAULTS | {
        "inference_mode": False,
        "r": config.rank,
        "lora_alpha": plain(config.rank if config.alpha is None else config.alpha),
        "use_rslora": config.rslora,
        "lora_bias": config.lora_bias,
        "layer_replication": as_lists(config.layer_replication),
    }
    if config.rules is None:
        fields |= {"lora_dropout": config.dropout, "use_dora": config.dora}
        fields |= write_init(config.init)
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
    fields |= write_init(_only("init", {_usual(rule.init) for rule in rules}))
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
        if rule is not None and not is_linear(module, names):
            odd.append(module.name)
    bare = _bare(config, rules, names)
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
        if not taken and not bare:
            patterns = shorten([rule.pattern for rule in rules])
            raise ConfigError(
                f"The targets {patterns} take no path of `names`. Closest: "
                f"{shorten(closest(rules[0].pattern, [e[0] for e in names.entries]))}."
            )
        # An empty list, not null: PEFT would add the modules that it usually adapts.
        fields["target_modules"] = sorted(short_targets(taken, left))
    fields |= beside_to_peft(config, taken, names)
    if bare:
        others = [t.name for t in names.tensors(LAYERS) if t.name not in bare]
        fields["target_parameters"] = sorted(short_parameters(bare, others))
        modules = (m for m in names.expand(LAYERS) if m.name in taken)
        conv1d = any(_is_conv1d(module, names) for module in modules)
        check_alone(fields | {"fan_in_fan_out": conv1d}, WHAT)
        check_owners(taken, bare, WHAT)
    values = taken | bare
    ranks = {name: rule.rank for name, rule in values.items()}
    alphas = {name: plain(rule.alpha) for name, rule in values.items()}
    fields["rank_pattern"] = condense(ranks, fields["r"])
    fields["alpha_pattern"] = condense(alphas, fields["lora_alpha"])
    return dict(sorted(fields.items()))


def _bare(config: Any, rules: Sequence[Any], names: NameMap) -> dict[str, Any]:
    """The rules of bare parameters, by the names of their tensors."""
    found = {}
    for tensor in names.expand_parameters(LAYERS):
        rule = _rule(config, rules, names, tensor)
        if rule is not None:
            found[tensor.name] = rule
        elif ALL_LINEAR in {r.pattern for r in rules} and tensor.layout == "same":
            if not any(_hit(pattern, tensor, names) for pattern in config.exclude):
                raise ConfigError(
                    f"Whether 'all-linear' takes {tensor.path!r} cannot be told from "
                    "`names`, which calls it 'same'. Give it a rule of its own, or "
                    "`exclude` it."
                )
    return found


def _is_conv1d(module: Module, names: NameMap) -> bool:
    return module.layout == "same" and is_linear(module, names)


def _rule(config: Any, rules: Sequence[Any], names: NameMap, module: Module) -> Any:
    """The first rule that takes a module, as `plan` would find it."""
    if any(_hit(pattern, module, names) for pattern in config.exclude):
        return None
    if config.layers is not None and module.layer not in config.layers:
        return None
    return next((rule for rule in rules if _hit(rule.pattern, module, names)), None)


def _hit(pattern: str, module: Module, names: NameMap) -> bool:
    if pattern == ALL_LINEAR:  # ours, which takes convolutions too
        return is_linear(module, names) or module.layout == "conv"
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


def _usual(init: Any) -> Any:
    """One name for those that are the same."""
    return {"kaiming": True, "random": False}.get(init, init)


def as_lists(ranges: Ranges | None) -> list[list[int]] | None:
    """Ranges of layers as JSON has them."""
    return None if ranges is None else [list(pair) for pair in ranges]


def plain(value: float) -> int | float:
    """A number as JSON should show it: 16, not 16.0."""
    return int(value) if float(value).is_integer() else float(value)
