"""LoRA for any JAX model, as pure functions over its parameter pytree."""

# ruff: noqa: I001  (in the order of use)
from ._config import LoraConfig as LoraConfig
from .planning import Plan as Plan
from .planning import plan as plan
from .planning import init as init
from .adapters import Adapter as Adapter
from .adapters import bind as bind
from .transform import adapt as adapt
from .merging import merge as merge
from ._count import count as count
