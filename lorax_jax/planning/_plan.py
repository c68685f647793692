"""`plan`: from a configuration and a model to a list of sites, without any arrays."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from .. import _paths
from .._config import LoraConfig
from .._errors import PlanError, PlanWarning, ReplicationError, closest, shorten
from .._ranges import Ranges
from ..adapters import Role, is_weight, stored
from ..replication import layers_of, shared_layers
from ..transform import Consumer, Leaf, read
from ._begin import check_inits
from ._beside import beside
from ._rehearse import rehearse
from ._select import Selection
from ._sites import Site, Slot
from ._table import table


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where an adapter will act. Iterating gives its sites; printing gives a table.

    Attributes:
        config: what was asked for.
        slots: the adapted leaves, each with its sites.
        base: number of values in the parameters.
        base_bytes: their size in bytes.
        matches: for each rule, its pattern and how many sites it took.
        repeated: how unrolled layers are repeated, where the parameters show that they
            are and the configuration does not say of which layers.
    """

    config: LoraConfig
    slots: tuple[Slot, ...]
    base: int
    base_bytes: int
    matches: tuple[tuple[str, int], ...]
    repeated: Ranges | None = None

    def __iter__(self) -> Iterator[Site]:
        return (site for slot in self.slots for site in slot.sites if site is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def trainable(self) -> int:
        """Number of trainable values, at true ranks."""
        return sum(site.trainable for site in self)

    @property
    def total(self) -> int:
        """Number of all values: the parameters and the adapter."""
        return self.base + self.trainable

    def memory(self, *, optimizer_copies: float = 2) -> "Memory":
        """Bytes that training will hold beside activations.

        Args:
            optimizer_copies: optimizer state in multiples of the adapter: 2 for Adam.
        """
        values = sum(
            math.prod(shape) for slot in self.slots for shape in slot.shapes().values()
        )
        adapter = values * jnp.dtype(self.config.dtype).itemsize
        return Memory(
            self.base_bytes, adapter, adapter, int(adapter * optimizer_copies)
        )

    def __str__(self) -> str:
        return table(self)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the device: what the base and the adapter's training take."""

    base: int
    adapter: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.base + self.adapter + self.gradients + self.optimizer

    def __str__(self) -> str:
        parts = dataclasses.asdict(self) | {"total": self.total}
        return ", ".join(
            f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items()
        )


def plan(
    config: LoraConfig,
    params: Any,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    roles: Mapping[str, Any] | None = None,
    materialize: str | Iterable[str] = "error",
    custom: str = "error",
) -> Plan:
    """Decides which weights of a model are adapted, and prints as a table.

    Which axes of a weight are summed over, produced or carried is read off the jaxpr
    of `fn(params, *args, **kwargs)`, never guessed from shapes. Nothing is allocated:
    `params` and `args` may be `jax.ShapeDtypeStruct`s, as `jax.eval_shape` gives them.

    Args:
        config: what to adapt.
        params: the parameter tree, or its types.
        fn: the model: any function whose first argument is the parameter tree.
        args: its other positional arguments, or their types.
        kwargs: its keyword arguments.
        roles: instead of `fn`, or over what it shows: path -> a dict with `inputs`,
            `outputs` and optionally `batch` (tuples of axes), `lookup` (`True` for a
            table whose `inputs` axis is looked up) and `groups` (of outputs, as in
            grouped convolutions).
        materialize, custom: what `adapt` will be told. A plan that it would refuse
            warns (`PlanWarning`) with the reason and the way out.

    Returns:
        A `Plan`.

    Raises:
        PlanError: if a target matches nothing, or not what it `expect`s; if a matched
            leaf is used by no product; if a tied weight is matched and `tie` is not
            chosen; if a rank exceeds what a weight can have; if the layers are not
            repeated as `layer_replication` says.

    Example:
        >>> import jax, lorax_jax as lj
        >>> params = {"attn": {"q": jax.ShapeDtypeStruct((64, 4, 16), jnp.float32)}}
        >>> fn = lambda p, x: jnp.einsum("bd,dnh->bnh", x, p["attn"]["q"])
        >>> x = jax.ShapeDtypeStruct((2, 64), jnp.float32)
        >>> plan = lj.plan(lj.LoraConfig("attn/q", rank=4), params, fn, (x,))
        >>> [(site.path, site.rank, site.trainable) for site in plan]
        [('attn/q', 4, 512)]
    """
    if not isinstance(config, LoraConfig):
        raise PlanError(
            f"`config` = {config!r:.60} is no `LoraConfig`. Write "
            "`plan(LoraConfig(targets=...), params, fn, args)`."
        )
    if not isinstance(args, tuple | list):
        raise PlanError(
            f"`args` is a {type(args).__name__}; the function's other arguments are "
            "meant, in a tuple: `args=(x,)`."
        )
    if fn is None and roles is None:
        raise PlanError(
            "`plan` needs `fn` to see how the model uses its weights. Pass the "
            "function and its arguments, `plan(config, params, fn=model.apply, "
            "args=(ids,))`, or declare `roles` by hand."
        )
    check_inits(config)
    try:
        ranges = layers_of(params, config.layer_replication)
    except ReplicationError as error:
        raise PlanError(str(error)) from None
    if ranges != config.layer_replication:
        config = dataclasses.replace(config, layer_replication=ranges)
    arrays = [
        (path, leaf)
        for path, leaf in _paths.flatten(params, is_leaf=is_weight)[0]
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    ]
    reading = None
    if fn is not None:
        reading = read(fn, params, args, kwargs or {})
        found = reading.leaves
    else:
        found = {path: Leaf(path, tuple(leaf.shape)) for path, leaf in arrays}
    _declare(found, roles or {})
    selection = Selection(config, found, {path: leaf.dtype for path, leaf in arrays})
    slots = selection.slots()
    slots += beside(config, selection.candidates, slots, selection.dtypes)
    if reading is not None:
        refusal = rehearse(reading, slots, config.dtype, materialize, custom)
        if refusal is not None:
            warnings.warn(refusal, PlanWarning, stacklevel=2)
    patterns = [rule.pattern for rule in selection.rules]
    return Plan(
        config,
        tuple(slots),
        *stored(params),
        tuple(zip(patterns, selection.counts, strict=True)),
        repeated=shared_layers(params) if ranges is None else None,
    )


def _declare(found: dict[str, Leaf], roles: Mapping[str, Any]) -> None:
    """Lets declared roles stand in for what the trace found."""
    for path, declared in roles.items():
        if path not in found:
            near = shorten(closest(path, found))
            raise PlanError(
                f"`roles` names {path!r}, which is no leaf. Closest: {near}."
            )
        if isinstance(declared, Role):
            declared = dataclasses.asdict(declared)
        if not isinstance(declared, Mapping):
            declared = {"?": declared}
        known = {f.name for f in dataclasses.fields(Role)}
        if declared.get("part") is not None:
            known -= {"part"}  # a rule names parts; roles are those of the leaf
        unknown = set(declared) - known
        leaf = found[path]
        inputs, outputs = declared.get("inputs", ()), declared.get("outputs", ())
        batch = declared.get("batch", ())
        axes = sorted((*inputs, *outputs, *batch))
        if unknown or axes != list(range(len(leaf.shape))) or not (inputs and outputs):
            raise PlanError(
                f"`roles[{path!r}]` = {dict(declared)} must give each of the "
                f"{len(leaf.shape)} axes of shape {leaf.shape} to exactly one of "
                "`inputs`, `outputs` and `batch`, e.g. "
                "{'inputs': (0,), 'outputs': (1,)}."
            )
        named: dict[int, Any] = dict.fromkeys(inputs, "in")
        named |= dict.fromkeys(outputs, "out")
        kind = "lookup" if declared.get("lookup") else "product"
        whole = tuple(named.get(i, "batch") for i in range(len(leaf.shape)))
        declared_here = Consumer(
            kind, whole, source="declared in `roles`", groups=declared.get("groups", 1)
        )
        groups = declared_here.groups
        if groups < 1 or leaf.size(declared_here, "out") % groups:
            raise PlanError(
                f"`roles[{path!r}]` has {groups} groups, into which the "
                f"{leaf.size(declared_here, 'out')} outputs of shape {leaf.shape} do "
                "not divide."
            )
        leaf.consumers = [declared_here]
