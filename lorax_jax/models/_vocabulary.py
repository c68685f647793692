"""Models with more tokens than their checkpoints."""

import dataclasses
from typing import NamedTuple

from .. import _paths
from .._growth import Growth, enlarge, growth_of
from ._base import Params
from ._encoder import Encoder
from ._model import Model


class GrownModel(NamedTuple):
    """What `grow` returns.

    Attributes:
        model: the model, whose config counts the new tokens.
        params: its parameters.
        growth: how they grew.
    """

    model: Model | Encoder
    params: Params
    growth: Growth


def token_axes(model: Model | Encoder) -> dict[str, int]:
    """The parameters that count tokens, each with the axis that does.

    They are those whose shapes change with `vocab_size`: the table, and of an untied
    model the head; BERT's masked-LM head has a bias for each token too.

    Args:
        model: any model here.

    Returns:
        Path -> axis.

    Example:
        >>> from lorax_jax.models import from_config
        >>> token_axes(from_config({"model_type": "gpt2"}))
        {'wte/embedding': 0}
    """
    larger = _with_tokens(model, model.config.vocab_size + 1)
    both = (_paths.flatten(m.abstract())[0] for m in (model, larger))
    return {
        path: axis
        for (path, one), (_, other) in zip(*both, strict=True)
        for axis, (n, m) in enumerate(zip(one.shape, other.shape, strict=True))
        if n != m
    }


def grow(
    model: Model | Encoder,
    params: Params,
    *,
    to: int,
    multiple: int = 1,
    init: str = "mean",
    seed: int = 0,
) -> GrownModel:
    """A model and its parameters with rows for new tokens.

    Every parameter that counts tokens grows; see `lorax_jax.grow` for how.

    Args:
        model: as `load` gives it.
        params: its parameters, or their types.
        to: how many tokens there shall be: `len(tokenizer)`.
        multiple: round that up to a multiple of it.
        init: how new rows start: `"mean"`, `"zeros"` or `"normal"`.
        seed: of `"normal"`.

    Returns:
        `(model, params, growth)`. What was given is untouched.

    Raises:
        GrowthError: if the model has more tokens already.

    Example:
        >>> import jax
        >>> from lorax_jax.models import from_config
        >>> model = from_config({"model_type": "gpt2", "n_layer": 1, "n_embd": 8,
        ...                      "n_head": 2, "n_positions": 4, "vocab_size": 16})
        >>> model, params, growth = grow(model, model.init(jax.random.key(0)), to=18)
        >>> model.config.vocab_size, params["wte"]["embedding"].shape
        (18, (18, 8))
    """
    axes = token_axes(model)
    growth = growth_of(params, axes, to=to, multiple=multiple, init=init, seed=seed)
    larger = _with_tokens(model, growth.after)
    return GrownModel(larger, enlarge(params, growth), growth)


def _with_tokens(model: Model | Encoder, count: int) -> Model | Encoder:
    config = dataclasses.replace(model.config, vocab_size=count)
    return dataclasses.replace(model, config=config)  # pyright: ignore
