"""`LoraConfig`'s whole leaves, biases and rows from PEFT's fields, and back."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .._errors import ConfigError, closest, shorten
from .._names import Module, NameMap
from ._beside import Whole, rows_by_module
from ._modules import LAYERS, group, takes
from ._patterns import short_targets


def beside_from_peft(
    config: Mapping[str, Any], adapted: Collection[str], names: NameMap, what: str
) -> dict[str, Any]:
    """The arguments `whole`, `bias` and `token_rows` of a `LoraConfig`.

    Args:
        config: the fields of an `adapter_config.json`.
        adapted: names of the modules that have factors.
        names: the model's name table.
        what: what to call the configuration in messages.

    Raises:
        ConfigError: if `modules_to_save` names no module of the table.
        CheckpointError: if a field is malformed.
    """
    chosen = Whole(config, what)
    tensors = list(names.tensors(LAYERS))
    saved = {tensor: None for tensor in tensors if chosen.saves(tensor.name)}
    head = f"{names.head}.weight"
    shares = names.tied is not None and names.module_path(names.head) is None
    table = names.tensor(names.tied or "") if shares else None
    for name in chosen.required:
        one = Whole({"modules_to_save": [name]}, what)
        if not any(map(one.saves, [head, *(tensor.name for tensor in tensors)])):
            known = [tensor.name.rpartition(".")[0] for tensor in names.tensors(1)]
            raise ConfigError(
                f"{what} has {name!r} in `modules_to_save`, which takes no module of "
                f"`names`. Closest: {shorten(closest(name, known, 3))}."
            )
    ensured = bool(config.get("ensure_weight_tying"))
    if shares and not ensured and any(chosen.saves(n) for n in (head, table or "")):
        raise ConfigError(
            f"{what} trains one use of {table!r} whole, and the head shares it. Set "
            "`ensure_weight_tying` to true to train it for both."
        )
    if shares and ensured and chosen.saves(head):
        saved |= {tensor: None for tensor in tensors if tensor.name == table}
    # In a model without such biases PEFT trains none, and so must this.
    biases = (tensor for tensor in tensors if chosen.biases(tensor.name, adapted))
    unknown = chosen.bias == "lora_only" and not adapted
    result: dict[str, Any] = {
        "whole": tuple(group(saved)),
        "bias": chosen.bias if unknown or any(biases) else "none",
    }
    rows: dict[str | None, tuple[int, ...]] = {}
    for module, ids in rows_by_module(config, names, what).items():
        path = None if module is None else names.module_path(module)
        if path is None and module is None:
            result["token_rows"] = ids
            return result
        rows |= {pattern: ids for pattern in group(_at(tensors, path))}
    return result | {"token_rows": rows}


def _at(tensors: Iterable[Module], path: str | None) -> dict[Module, None]:
    return {tensor: None for tensor in tensors if tensor.path == path}


def beside_to_peft(
    config: Any, adapted: Collection[str], names: NameMap
) -> dict[str, Any]:
    """PEFT's fields for `whole`, `bias` and `token_rows` of a `LoraConfig`.

    Args:
        config: a `LoraConfig`.
        adapted: names of the modules that have factors.
        names: the model's name table.

    Raises:
        ConfigError: if PEFT cannot express it.
    """
    tensors = list(names.tensors(LAYERS))
    tied = names.tied if names.module_path(names.head) is None else None
    fields: dict[str, Any] = {"bias": config.bias}
    copies = {
        tensor.name: tensor.path
        for tensor in tensors
        if any(takes(pattern, tensor) for pattern in config.whole)
    }
    for pattern in config.whole:
        if not any(takes(pattern, tensor) for tensor in tensors):
            raise _nothing("whole", pattern, names)
    if copies:
        fields["modules_to_save"] = _modules(copies, tensors)
        if tied in copies.values():
            fields["modules_to_save"] = sorted({*fields["modules_to_save"], names.head})
            fields["ensure_weight_tying"] = True
    rows: dict[str, list[int]] = {}
    for pattern, ids in config.token_rows:
        if pattern is None:
            fields["trainable_token_indices"] = list(ids)
            continue
        modules = [m.name for m in names.expand(LAYERS) if takes(pattern, m)]
        if not modules:
            raise _nothing("token_rows", pattern, names)
        rows |= dict.fromkeys(modules, list(ids))
    if rows:
        fields["trainable_token_indices"] = rows
    both = sorted(set(rows) & set(adapted))
    if both:
        raise ConfigError(
            f"{shorten(both)} has factors and trained rows, and PEFT keeps one of them "
            "for a module. Leave one of the two out."
        )
    return fields


def _modules(copies: Mapping[str, str], tensors: Iterable[Module]) -> list[str]:
    """The shortest names that take these tensors alone, and whole modules of them."""
    modules: dict[str, list[str]] = {}
    for tensor in tensors:
        modules.setdefault(tensor.name.rpartition(".")[0], []).append(tensor.name)
    chosen = list(dict.fromkeys(name.rpartition(".")[0] for name in copies))
    for module in chosen:
        lacking = [name for name in modules[module] if name not in copies]
        if lacking:
            raise ConfigError(
                f"PEFT trains modules whole, and of {module!r} only a part is: "
                f"{shorten(lacking)} is not. Name all of its leaves in `whole`."
            )
    others = [module for module in modules if module not in chosen]
    short = short_targets(chosen, others)
    for names in (short, chosen):
        taken = Whole({"modules_to_save": names}, "")
        if not any(taken.saves(name) for m in others for name in modules[m]):
            return sorted(names)
    raise ConfigError(
        f"PEFT's `modules_to_save` takes every module whose name ends in an entry, and "
        f"{shorten(chosen)} would take more. Give them names of their own."
    )


def _nothing(field: str, pattern: str, names: NameMap) -> ConfigError:
    near = shorten(closest(pattern, [entry[0] for entry in names.entries], 3))
    return ConfigError(
        f"`{field}` names {pattern!r}, which takes no path of `names`. Closest: {near}."
    )
