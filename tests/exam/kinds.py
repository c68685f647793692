"""Every kind of adapter, as what it makes of one weight. All take the same exam.

To enter a kind: add a builder that binds it to a weight, and say what the dense weight
is by the slow reference.
"""

import dataclasses
from collections.abc import Callable

import jax
from helpers import dense_params, random_adapter

import lorax_jax as lj


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    Attributes:
        adapters: `adapters(key, params, role, dtype)` gives the adapters to bind.
        dense: `dense(params, adapters)` gives the dense parameters, slowly.
    """

    name: str
    adapters: Callable
    dense: Callable = dense_params

    def bind(self, params, adapters):
        return lj.bind(params, *adapters)


def _one(key, params, role, dtype="float32"):
    # Ranks that no axis of any layout has, so that shapes tell factors from weights.
    return [random_adapter(key, params, [role], rank=5, dtype=dtype)]


def _two(key, params, role, dtype="float32"):
    first, second = jax.random.split(key)
    return [
        random_adapter(first, params, [role], rank=5, dtype=dtype),
        random_adapter(second, params, [role], rank=7, scale=-1.5, dtype=dtype),
    ]


KINDS = [Kind("lora", _one), Kind("two_lora", _two)]
