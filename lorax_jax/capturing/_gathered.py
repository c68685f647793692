"""`Gathered`: what was gathered of each weight, and of which model."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .. import _paths
from ..adapters import is_weight
from ..planning import Slot, places, witness


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Gathered(Mapping[str, Any]):
    """What initializers read: name of an adapted weight -> what was gathered there.

    A mapping and a pytree. It holds a few entries of each weight, by which `init` tells
    the model that was looked at from others of its shapes.

    Attributes:
        states: what was gathered by name; arrays have the leading axes
            `(*layers, *experts, *groups)` of the weight.
        witness: some entries of each weight.

    Example:
        >>> import lorax_jax as lj
        >>> params = {"w": jnp.ones((6, 4))}
        >>> loss = lambda params, x: ((x @ params["w"]) ** 2).mean()
        >>> xs = [jax.random.normal(jax.random.key(0), (8, 6))]
        >>> plan = lj.plan(lj.LoraConfig("w", rank=1), params, loss, (xs[0],))
        >>> found = lj.capture_grad(loss, plan).run(params, xs)
        >>> found["w"].size, found.witness["w"].shape
        (4, (16,))
    """

    states: dict[str, Any]
    witness: dict[str, jax.Array]

    def __getitem__(self, name: str) -> Any:
        return self.states[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)


def witnesses(slots: Iterable[Slot], params: Any) -> dict[str, jax.Array]:
    """Some entries of the weight of each slot, by name."""
    leaves = dict(_paths.flatten(params, is_leaf=is_weight)[0])
    return {slot.name: witness(leaves[slot.role.path]) for slot in slots}


def no_witnesses(slots: Iterable[Slot]) -> dict[str, jax.Array]:
    """What stands for those of a model that is still to be seen."""
    return {s.name: jnp.zeros(len(places(s.shape)), jnp.float32) for s in slots}


def differ(one: Mapping[str, jax.Array], other: Mapping[str, jax.Array]) -> jax.Array:
    """Whether witnesses of the same weights are those of two models."""

    def apart(x, y):  # NaN is like NaN: there is another message for it
        return jnp.any((x != y) & ~(jnp.isnan(x) & jnp.isnan(y)))

    return jnp.any(jnp.stack([apart(one[name], other[name]) for name in one]))
