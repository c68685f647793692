"""PEFT's `adapter_config.json`: what its fields mean, and how its patterns match."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from .._errors import CheckpointError, ConfigError, shorten
from .._ranges import Ranges, checked_ranges
from ._beside import Whole
from ._patterns import Patterns, compile_pattern

# The release whose fields these are. A newer one may write more of them.
VERSION = "0.21.2"

# Every field that PEFT writes, and its value when nothing is asked for.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": VERSION,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

# Read and acted on.
_HANDLED = {
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}

# Knowingly ignored: about classes and versions, or without a meaning by themselves.
_IGNORED = {
    "auto_mapping",
    "inference_mode",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}

# Refused where set: each changes what the adapted model computes.
_REFUSED = {
    "alora_invocation_tokens": "an activated adapter acts after its tokens only",
    "arrow_config": "an Arrow router chooses between adapters for each token",
    "kasa_config": "KaSA cuts the base's smallest singular values",
    "megatron_config": "the factors are those of Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA keeps a sampler beside the factors",
    "use_bdlora": "a factor is block-diagonal",
    "use_qalora": "QALoRA pools the inputs",
    "velora_config": "VeLoRA keeps projections beside the factors",
}


def check_fields(config: Mapping[str, Any], what: str) -> None:
    """Refuses a configuration that asks for what is not known here, by name.

    Args:
        config: the fields.
        what: what to call it in messages.

    Raises:
        CheckpointError: naming every field that is refused or unknown.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{what} has `peft_type` = {kind!r}; only 'LORA' is read here. Convert the "
            "adapter with PEFT's `convert_to_lora`, or merge it there and load the "
            "merged model."
        )
    unknown = sorted(
        key
        for key, value in config.items()
        if key not in _HANDLED | _IGNORED | set(_REFUSED)
        and value not in (None, False, {}, [], "")
    )
    if unknown:
        raise CheckpointError(
            f"{what} sets {shorten(unknown)}, which PEFT {VERSION} does not have, so "
            "what it means for the result is not known. Set it to null if it changes "
            "nothing."
        )
    set_ = [
        f"  {key} = {value!r}: {_REFUSED[key]}"
        for key, value in sorted(config.items())
        if key in _REFUSED and value not in (None, False, [], {}, "")
    ]
    if set_:
        raise CheckpointError(
            f"{what} asks for what this library does not know:\n"
            + "\n".join(set_[:8])
            + "\nMerge the adapter with PEFT's `merge_and_unload` and load the merged "
            "model, or train it without."
        )


def number(config: Mapping[str, Any], key: str, what: str) -> float:
    """A finite number of the configuration.

    Raises:
        CheckpointError: if it is something else.
    """
    value = config.get(key, DEFAULTS[key])
    return _number(value, f"`{key}`", what)


def _number(value: Any, label: str, what: str) -> float:
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    # The bound keeps integers that no float can hold out of every later formula.
    if not fine or not abs(value) < 1e30 or not math.isfinite(value):
        raise CheckpointError(f"{what} has {label} = {value!r:.80}, no finite number.")
    return value


def rank(value: Any, label: str, what: str) -> int:
    """A rank of the configuration.

    Raises:
        CheckpointError: if it is no positive integer, or beyond any matrix.
    """
    fine = isinstance(value, int) and not isinstance(value, bool)
    if not fine or not 1 <= value < 1 << 24:
        raise CheckpointError(
            f"{what} has {label} = {value!r:.80}; a rank is an integer from 1 up."
        )
    return value


def layer_replication(config: Mapping[str, Any], what: str) -> Ranges | None:
    """The ranges of layers that the model is made of, or `None`.

    Raises:
        CheckpointError: if they are no ranges.
    """
    ranges = config.get("layer_replication")
    try:
        name = f"`layer_replication` of {what}"
        return None if ranges in (None, []) else checked_ranges(ranges, name)
    except ConfigError as error:  # here it is a file that is wrong
        raise CheckpointError(str(error)) from None


class Ranks:
    """Rank, alpha and scale of each module, by PEFT's rule.

    A key `p` of `rank_pattern` or `alpha_pattern` is a regex, and takes a module when
    `(.*\\.)?(p)$` matches its name; the first such key wins. The two patterns are
    looked up independently.

    Args:
        config: the fields of an `adapter_config.json`.
        what: what to call it in messages.

    Raises:
        CheckpointError: if a number or a pattern is not acceptable.

    Example:
        >>> ranks = Ranks({"r": 8, "lora_alpha": 16, "rank_pattern": {"up": 2}}, "it")
        >>> ranks("layers.0.mlp.up"), ranks("layers.0.mlp.gate_up")
        ((2, 16, 8.0), (8, 16, 2.0))
    """

    def __init__(self, config: Mapping[str, Any], what: str):
        self.rslora = flag(config, "use_rslora", what)
        self.rank = rank(config.get("r", DEFAULTS["r"]), "`r`", what)
        self.alpha = number(config, "lora_alpha", what)
        self.ranks = {
            key: rank(value, f"`rank_pattern[{key!r:.80}]`", what)
            for key, value in _pattern(config, "rank_pattern", what).items()
        }
        self.alphas = {
            key: _number(value, f"`alpha_pattern[{key!r:.80}]`", what)
            for key, value in _pattern(config, "alpha_pattern", what).items()
        }
        self._find = Patterns((*self.ranks, *self.alphas), what)

    def __call__(self, module: str) -> tuple[int, float, float]:
        """`(rank, alpha, scale)` of a module."""
        key = self._find(self.ranks, module)
        rank = self.rank if key is None else self.ranks[key]
        key = self._find(self.alphas, module)
        alpha = self.alpha if key is None else self.alphas[key]
        return rank, alpha, alpha / (math.sqrt(rank) if self.rslora else rank)

    def takes(self, pattern: str, module: str) -> bool:
        """Whether one of the patterns takes a module."""
        return self._find([pattern], module) is not None


def _pattern(config: Mapping[str, Any], key: str, what: str) -> dict[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict) or not _all(found, str):
        raise CheckpointError(
            f"{what} has `{key}` = {found!r:.80}, which is no object."
        )
    return found


def flag(config: Mapping[str, Any], key: str, what: str) -> bool:
    """A field that is true or false.

    Raises:
        CheckpointError: if it is something else.
    """
    value = config.get(key, False)
    if not isinstance(value, bool) and value is not None:
        raise CheckpointError(f"{what} has `{key}` = {value!r:.80}, not true or false.")
    return bool(value)


class Targets:
    """Which modules PEFT adapts: `target_modules` and what narrows it.

    A string is a regex for the whole name. An entry of a list is a whole name or what
    follows a dot in it; entries that are a whole name escape `layers_to_transform`. A
    module is left out if it is one of `modules_to_save`, or inside one: whole
    components of its name match an entry, which is a regex there.

    Args:
        config: the fields of an `adapter_config.json`.
        what: what to call it in messages.

    Raises:
        CheckpointError: if a field is not what PEFT writes.

    Example:
        >>> chosen = Targets({"target_modules": ["q_proj"]}, "it")
        >>> chosen("layers.0.q_proj"), chosen("layers.0.xq_proj")
        (True, False)
    """

    def __init__(self, config: Mapping[str, Any], what: str):
        self.targets = _names_or_regex(config, "target_modules", what)
        self.excluded = _names_or_regex(config, "exclude_modules", what)
        self.saved = [
            compile_pattern(rf"(^|.*\.){name}($|\..*)", name, what)
            for name in Whole(config, what).names
        ]
        layers = config.get("layers_to_transform")
        self.layers = [layers] if isinstance(layers, int) else layers or None
        patterns = config.get("layers_pattern") or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not _all(self.layers or [], int) or not _all(patterns, str):
            raise CheckpointError(
                f"{what} has `layers_to_transform` = {layers!r:.80} and "
                f"`layers_pattern` = {patterns!r:.80}; indices and names are meant."
            )
        narrowed = self.layers is not None or patterns
        if narrowed and (isinstance(self.targets, str) or self.layers is None):
            raise CheckpointError(
                f"{what} has `layers_to_transform` = {layers!r:.80} and "
                f"`layers_pattern` = {patterns!r:.80} beside `target_modules` = "
                f"{self.targets!r:.80}. PEFT takes them for a list of targets only, "
                "and a pattern together with layers. Say which layers in the regex, or "
                "list the targets."
            )
        wrapped = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns]
        self._layer = [
            compile_pattern(regex, pattern, what)
            for regex, pattern in zip(wrapped, patterns, strict=True)
        ] or [re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")]
        self._patterns = Patterns((), what)  # its clock
        self._regex = {
            regex: compile_pattern(regex, regex, what)
            for regex in (self.targets, self.excluded)
            if isinstance(regex, str)
        }

    @property
    def all_linear(self) -> bool:
        """Whether the targets are PEFT's `"all-linear"`."""
        return isinstance(self.targets, str) and self.targets.lower() == "all-linear"

    def __call__(self, module: str) -> bool:
        """Whether a module of this name is adapted."""
        if not self.names(module):
            return False
        return module in (self.targets or ()) or self.in_layers(module)

    def names(self, module: str) -> bool:
        """Whether the targets take the module, whatever its layer."""
        if self.targets is None or self.excludes(module):
            return False
        return self._hits(self.targets, module)

    def in_layers(self, module: str) -> bool:
        """Whether the module is in one of the layers."""
        if not self.layers:
            return True
        found = (pattern.match(module) for pattern in self._layer)
        layer = next((match for match in found if match is not None), None)
        # Patterns are not parenthesized: an alternative may match without an index.
        index = None if layer is None else layer["index"]
        return index is not None and int(index) in self.layers

    def excludes(self, module: str) -> bool:
        """Whether `exclude_modules` or `modules_to_save` names the module."""
        if any(self._patterns.match(name.match, module) for name in self.saved):
            return True
        return self.excluded is not None and self._hits(self.excluded, module)

    def _hits(self, names: str | frozenset[str], module: str) -> bool:
        if isinstance(names, str):
            return self._patterns.match(self._regex[names].fullmatch, module)
        parts = module.split(".")
        return any(".".join(parts[i:]) in names for i in range(len(parts)))


def _names_or_regex(
    config: Mapping[str, Any], key: str, what: str
) -> str | frozenset[str] | None:
    found = config.get(key)
    if found is None or isinstance(found, str):
        return found or None
    if not isinstance(found, Collection) or not _all(found, str):
        raise CheckpointError(
            f"{what} has `{key}` = {found!r:.80}; a regex or a list of names is meant."
        )
    return frozenset(found)


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, Collection) and all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values
    )
