"""PEFT's `init_lora_weights`, and the initializer's name here.

How training started says what factors mean: those of a start that PEFT takes out of the
base belong to the residual that it leaves, and B of a MiCA adapter is never trained.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .._errors import CheckpointError

# PEFT's options of some starts, and their values when nothing is asked for.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "corda": {
        "cache_file": None,
        "corda_method": "ipm",
        "covariance_file": None,
        "prune_temporary_fields": True,
        "use_float16_for_covariance": False,
        "verbose": False,
    },
    "eva": {
        "adjust_scaling_factors": True,
        "label_mask_value": -100,
        "rho": 2.0,
        "tau": 0.99,
        "use_label_mask": True,
        "whiten": False,
    },
    "lora_ga": {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16},
}

# How statistics are gathered, cached and spent on ranks: said to `capture` and
# `allocate` here, not to the configuration.
_GATHERING = {
    "corda": set(_DEFAULTS["corda"]) - {"corda_method"},
    "eva": set(_DEFAULTS["eva"]) - {"whiten"},
    "lora_ga": set(),
}

# Written in any case by PEFT's users.
_ANY_CASE = ("gaussian", "olora", "mica")
_KNOWN = ("eva", "lora_ga", "orthogonal", "pissa", *_ANY_CASE)
_NITER = re.compile(r"pissa_niter_[0-9]{1,6}")


class Options(NamedTuple):
    """An initializer's options here and there.

    Attributes:
        kind: the class of ours, a frozen dataclass.
        read: ours from PEFT's fields, all of them.
        write: PEFT's fields from ours.
    """

    kind: type
    read: Callable[[Mapping[str, Any]], Any]
    write: Callable[[Any], Mapping[str, Any]]


_OPTIONS: dict[str, Options] = {}


def register_options(init: str, options: Options) -> None:
    """Tells how options of `init_lora_weights` = `init` go over to ours and back."""
    _OPTIONS[init] = options


def read_init(config: Mapping[str, Any], what: str, *, trained: bool = False) -> Any:
    """The initializer that a configuration names, as `LoraConfig(init=...)` takes it.

    Args:
        config: the fields of an `adapter_config.json`.
        what: what to call it in messages.
        trained: it describes factors in a file, which the options are in already:
            those that are not known here are left out.

    Raises:
        CheckpointError: if it is none, is LoftQ, or has options that are not known.

    Example:
        >>> read_init({"init_lora_weights": "corda"}, "it")
        'corda_ipm'
    """
    said = config.get("init_lora_weights", True)
    if said is None or isinstance(said, bool):
        return said is not False
    name = said.lower() if str(said).lower() in _ANY_CASE else said
    if name == "loftq":
        raise CheckpointError(
            f"{what} has `init_lora_weights` = 'loftq', which replaces the base by a "
            "quantized one: the factors are wrong on the original, and their start "
            "cannot be told from it. Merge the adapter with PEFT's `merge_and_unload`, "
            "or train it with another start."
        )
    if name == "corda":
        method = _fields(config, "corda", what)["corda_method"]
        if method not in ("ipm", "kpm"):
            raise CheckpointError(
                f"{what} has `corda_config['corda_method']` = {method!r:.80}; 'ipm' or "
                "'kpm' is meant."
            )
        return f"corda_{method}"
    known = name in _KNOWN or (isinstance(name, str) and _NITER.fullmatch(name))
    if not known:
        raise CheckpointError(
            f"{what} has `init_lora_weights` = {said!r:.80}, which PEFT does not know: "
            f"it has True, False, 'pissa_niter_N', 'corda', {str(_KNOWN)[1:-1]}, and "
            "tells upper case from lower."
        )
    if name not in _DEFAULTS:
        return name
    fields = _fields(config, name, what)
    odd = [
        field
        for field, value in fields.items()
        if field not in _GATHERING[name] and value != _DEFAULTS[name][field]
    ]
    if not odd or (trained and name not in _OPTIONS):
        return name
    if name not in _OPTIONS:
        raise CheckpointError(
            f"{what} has `{name}_config[{odd[0]!r}]` = {fields[odd[0]]!r:.80}, of "
            f"which nothing is known here. Leave it at {_DEFAULTS[name][odd[0]]!r}."
        )
    try:
        return _OPTIONS[name].read(fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{what} has a `{name}_config` that cannot be: {error}"
        ) from None


def write_init(init: Any) -> dict[str, Any]:
    """PEFT's fields for an initializer of ours.

    Names that PEFT does not have go over as they are, and PEFT refuses them.

    Raises:
        CheckpointError: if it has options that PEFT has no word for.

    >>> write_init("kaiming"), write_init("corda_kpm")["corda_config"]["corda_method"]
    ({'init_lora_weights': True}, 'kpm')
    """
    for name, options in _OPTIONS.items():
        if isinstance(init, options.kind):
            fields = _DEFAULTS[name] | dict(options.write(init))
            return {"init_lora_weights": name, f"{name}_config": fields}
    if init is True or init == "kaiming":
        return {"init_lora_weights": True}
    if init == "random":
        return {"init_lora_weights": False}
    if init in ("corda_ipm", "corda_kpm"):
        name, _, method = init.partition("_")
        fields = _DEFAULTS[name] | {"corda_method": method}
        return {"init_lora_weights": name, "corda_config": fields}
    if not isinstance(init, str | bool):
        raise CheckpointError(
            f"`init` = {init!r:.80} has options, and which of PEFT's they are is not "
            "known. Keep the `LoraConfig`, or name the initializer alone."
        )
    found = {"init_lora_weights": init}
    return found | ({f"{init}_config": _DEFAULTS[init]} if init in _DEFAULTS else {})


def on_residual(config: Mapping[str, Any]) -> bool:
    """Whether PEFT took this start out of the base, so that the factors in a file are
    right on the residual and wrong on the original."""
    init = config.get("init_lora_weights", True)
    begins = ("pissa", "olora", "corda", "lora_ga", "loftq")
    return isinstance(init, str) and init.lower().startswith(begins)


def _fields(config: Mapping[str, Any], name: str, what: str) -> dict[str, Any]:
    """The options of a start, all of them."""
    said = config.get(f"{name}_config")
    said = {} if said is None else said
    known = _DEFAULTS[name]
    odd = [f for f in said if f not in known] if isinstance(said, dict) else [said]
    if odd:
        raise CheckpointError(
            f"{what} has `{name}_config` with {odd[0]!r:.80}, which is no option of "
            f"PEFT's. Known: {', '.join(known)}."
        )
    return known | said
