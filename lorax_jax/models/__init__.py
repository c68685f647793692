"""Plain Flax models as pure functions over nested dictionaries of arrays.

Llama 2 and 3, Mistral, Qwen2, Qwen3, SmolLM2 and GPT-2: `load` one, `apply` it,
`generate` with it. BERT and MiniLM: `load` one, `apply` it, `mean_pool` what it gives.
"""

from .._errors import CheckpointError as CheckpointError
from .._errors import ConfigError as ConfigError
from ._cache import Cache as Cache
from ._encoder import Encoder as Encoder
from ._encoder import mean_pool as mean_pool
from ._from_config import from_config as from_config
from ._generate import generate as generate
from ._load import load as load
from ._load import to_hf as to_hf
from ._model import Model as Model
from ._transformers import tokenizer as tokenizer
from ._vocabulary import GrownModel as GrownModel
from ._vocabulary import grow as grow
from ._vocabulary import token_axes as token_axes
