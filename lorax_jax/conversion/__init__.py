"""Adapters that start from factors of the weight, as plain LoRA and back."""

from ._fold import fold as fold
from ._fold import unfold as unfold
from ._to_lora import Truncation as Truncation
from ._to_lora import to_lora as to_lora
