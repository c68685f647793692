"""`from_config`: the model that a Hugging Face config describes."""

from typing import Any, cast

import jax.numpy as jnp

from ._attention import BACKENDS, Backend
from ._bert_config import BertConfig
from ._config import config_from_hf
from ._encoder import Encoder
from ._model import Model
from ._stack import Remat

DTYPES = ("float32", "bfloat16", "float16")


def from_config(
    hf_config: Any,
    *,
    dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: Remat = None,
    attention: str = "auto",
) -> Model | Encoder:
    """A model from a Hugging Face config.

    Args:
        hf_config: a `transformers` config, or a mapping such as a parsed
            `config.json`.
        dtype: of activations and new parameters: float32, bfloat16 or float16.
        scan_layers: stack the layers and scan over them.
        remat: None, `"full"`, or a policy such as
            `jax.checkpoint_policies.dots_with_no_batch_dims_saveable`, for each layer.
        attention: `"auto"`, `"xla"` or `"cudnn"`.

    Returns:
        A `Model`, or for BERT an `Encoder`.

    Raises:
        ConfigError: if the config asks for something these models do not
            compute.
        ValueError: for any other argument that is not one of the above.

    Example:
        >>> from_config({"model_type": "gpt2"}, scan_layers=True).names[2]
        ('h/{i}/ln_1/scale', 'transformer.h.{i}.ln_1.weight', 'same')
    """
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"`dtype` = {dtype.name} must be one of {', '.join(DTYPES)}.")
    if not (remat in (None, "full") or callable(remat)):
        raise ValueError(
            f"`remat` = {remat!r} must be None, 'full' or a policy such as "
            "jax.checkpoint_policies.dots_with_no_batch_dims_saveable."
        )
    if attention not in BACKENDS:
        raise ValueError(
            f"`attention` = {attention!r} must be one of {', '.join(BACKENDS)}."
        )
    config = config_from_hf(hf_config)
    how = dtype, scan_layers, remat, cast(Backend, attention)
    if isinstance(config, BertConfig):
        return Encoder(config, *how)
    return Model(config, *how)
