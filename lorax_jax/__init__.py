"""LoRA for any JAX model, as pure functions over its parameter pytree."""

# ruff: noqa: I001  (in the order of use)
from ._config import LoraConfig as LoraConfig
from .replication import replicate as replicate
from .planning import Plan as Plan
from .planning import plan as plan
from .planning import init as init
from .adapters import Adapter as Adapter
from .adapters import bind as bind
from .transform import adapt as adapt
from .merging import merge as merge
from .capturing import capture as capture
from .capturing import capture_grad as capture_grad
from .allocating import allocate as allocate
from .allocating import kappa as kappa
from .allocating import plot_spectra as plot_spectra
from .allocating import spectra as spectra
from .conversion import fold as fold
from .conversion import unfold as unfold
from .conversion import to_lora as to_lora
from .planning import grow as grow
from ._growth import Growth as Growth
from ._count import count as count
from .auditing import audit as audit
from ._functional import functional as functional
from .checkpoint import save_adapter as save_adapter
from .checkpoint import load_adapter as load_adapter
from .checkpoint import export_merged as export_merged
from . import embedded as embedded
from . import errors as errors
from . import initializers as initializers
from . import models as models
from . import quant as quant
from . import _load_adapted as _load_adapted
from . import train as train
