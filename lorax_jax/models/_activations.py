"""The activation functions that a config may name."""

from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array, Float

from .._errors import ConfigError

Activation = Callable[[Float[Array, "..."]], Float[Array, "..."]]

# Hugging Face's names. `gelu` is the exact one (erf), the others its tanh form.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def checked_activation(attribute: str, name: str) -> str:
    """`name`, if it is one of these.

    Args:
        attribute: the config's attribute that names it.
        name: what it says.

    Raises:
        ConfigError: if there is no such activation here.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"`{attribute}` = {name!r} is not one of the activations here: "
            f"{', '.join(sorted(ACTIVATIONS))}."
        )
    return name
