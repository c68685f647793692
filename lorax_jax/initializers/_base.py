"""The protocol that every initializer follows."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, Float, PRNGKeyArray


class Start(NamedTuple):
    """Where an adapter starts.

    Attributes:
        a: shape `(d_in, rank)`.
        b: shape `(rank, d_out)`.
    """

    a: Float[Array, "d_in rank"]
    b: Float[Array, "rank d_out"]


class Initializer(Protocol):
    """`(weight, *, rank, scale, key) -> Start`, for a kernel used as `x @ weight`.

    The function is traced, and mapped with `vmap` over the layers of a stack. It gets
    the weight's type in place of the array: none of the methods here reads its values,
    so a large or sharded base is not touched.
    """

    def __call__(
        self,
        weight: Float[Array, "d_in d_out"] | jax.ShapeDtypeStruct,
        *,
        rank: int,
        scale: float,
        key: PRNGKeyArray,
    ) -> Start: ...


_REGISTRY: dict[Any, Callable[..., Start]] = {}


def register(*names: Any) -> Callable[[Callable[..., Start]], Callable[..., Start]]:
    """Registers an initializer under the names that `LoraConfig(init=...)` takes."""

    def add(fn: Callable[..., Start]) -> Callable[..., Start]:
        for name in names:
            _REGISTRY[name] = fn
        return fn

    return add


def names() -> list[Any]:
    """All registered names."""
    return list(_REGISTRY)


def get(name: Any) -> Callable[..., Start]:
    """The initializer registered under `name`.

    Raises:
        KeyError: if there is none.
    """
    return _REGISTRY[name]
