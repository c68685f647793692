"""What a layout is: one use of one weight."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from lorax_jax.adapters import Role

BATCH, SEQ, D, HEADS, SIZE, OUT, LAYERS, ROWS = 2, 3, 8, 2, 4, 6, 3, 11


@dataclasses.dataclass(frozen=True)
class Layout:
    """One use of one weight.

    Attributes:
        name: for the test's name.
        fn: `fn(w, x)`.
        weight: the weight's shape.
        x: the input's shape.
        role: roles of the weight's axes.
        ids: whether the input holds integers below `ROWS`.
        depth: how many products lie one behind the other.
        reverse: whether JAX differentiates it backwards; not through `while`.
        maps: whether JAX can `vmap` the model over one of its arguments alone.
        rule: what a rule says to get this role, beyond what the program shows.
    """

    name: str
    fn: Callable[[Any, Any], Any]
    weight: tuple[int, ...]
    x: tuple[int, ...]
    role: Role
    ids: bool = False
    depth: int = 1
    reverse: bool = True
    maps: bool = True
    rule: dict[str, Any] = dataclasses.field(default_factory=dict)

    def grad(self, fn, **kwargs):
        """The gradient of `fn`, by the derivatives that the layout has."""
        return (jax.grad if self.reverse else jax.jacfwd)(fn, **kwargs)


def role_of(inputs, outputs, batch=(), **kwargs):
    return Role("w", inputs, outputs, batch, **kwargs)
