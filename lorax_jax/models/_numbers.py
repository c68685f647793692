"""What the numbers of a config may be, checked before anything is made of them."""

import math
from collections.abc import Mapping
from typing import Any

from .._errors import ConfigError

_OPTIONAL = {"head_dim", "n_inner", "num_key_value_heads", "sliding_window"}
_COUNTS = _OPTIONAL | {
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "n_embd",
    "n_head",
    "n_layer",
    "n_positions",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
}
# Far above any model's; a damaged number would otherwise be worked on for hours.
_MOST = {"n_layer": 1000, "num_hidden_layers": 1000}
_MOST_OF_ANY = 1 << 31

_AT_LEAST_ZERO = {"initializer_range", "layer_norm_epsilon", "rms_norm_eps"}
_ABOVE_ZERO = {
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "original_max_position_embeddings",
    "rope_theta",
}


def check_numbers(fields: Mapping[str, Any]) -> None:
    """Raises for a number that no model can be made of.

    Args:
        fields: of a config, or of its `rope_parameters`; those not known here pass.

    Raises:
        ConfigError: naming the field, what it is, and what is meant.

    Example:
        >>> check_numbers({"num_attention_heads": 12, "rms_norm_eps": 1e-6})
    """
    for name, value in fields.items():
        if value is None and name in _OPTIONAL:
            continue
        size = math.nan  # of what is no number; it is in no range
        if isinstance(value, int | float) and not isinstance(value, bool):
            size = value
        if name in _COUNTS:
            most = _MOST.get(name, _MOST_OF_ANY)
            fine = isinstance(value, int) and 1 <= size <= most
            meant = f"a whole number from 1 to {most:,}"
        elif name in _ABOVE_ZERO:
            fine = 0 < size < math.inf
            meant = "a number above 0"
        elif name in _AT_LEAST_ZERO:
            fine = 0 <= size < math.inf
            meant = "a number from 0 up"
        else:
            continue
        if not fine:
            raise ConfigError(f"`{name}` = {value!r:.60}; {meant} is meant.")


def check_heads(width: int, heads: int, names: tuple[str, str]) -> None:
    """Raises if `heads` do not divide `width`."""
    if width % heads:
        raise ConfigError(
            f"`{names[0]}` = {width} is not a multiple of `{names[1]}` = {heads}."
        )
