"""`capture`: statistics of each adapted weight's inputs."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .. import _paths
from .._errors import CaptureError, shorten
from ..adapters import Adapted, Origin, is_weight
from ..planning import Plan, Slot
from ..statistics import Statistic
from ..structure import Factor
from ..transform import Note, Options, allowed, follow, is_dynamic, observe
from ._chosen import chosen
from ._gathered import differ, no_witnesses, witnesses
from ._mask import checked_mask
from ._run import run
from ._stats import Stats, mapped
from ._tap import APART, NONE, About, Tap
from ._values import check_values


def capture(
    fn: Callable[..., Any],
    plan: Plan,
    *,
    stat: Statistic,
    only: Iterable[str] | None = None,
    tokens: int | str = 0,
    materialize: str | Iterable[str] = "error",
) -> "Capture":
    r"""Makes a function that gathers a statistic of what reaches each adapted weight.

    Where the model computes $x W$, the rows $x$ are taken in. This happens inside the
    model, layer by layer in a scanned one, and leaves nothing behind but the state:
    no activations are kept, and nothing grows with the number of batches.

        gather = lj.capture(model.apply, plan, stat=lj.statistics.Moments())
        stats = gather.run(params, batches)
        adapter = lj.init(plan, params, key=key, stats=stats)

    `gather` itself is pure, for loops of one's own:

        stats = gather.init()
        for ids in batches:
            stats = jax.jit(gather)(stats, params, ids)

    Weights that are looked up, such as an embedding's, have numbers for inputs and are
    left out; so are leaves that are trained whole. Of a grouped kernel each group has
    a state, of experts each expert: of the rows that reach it. A weight that is used
    twice takes in both.

    Args:
        fn: the model, `fn(params, *args)`. It is not differentiated, so functions with
            derivatives of their own are gone into.
        plan: which weights.
        stat: what to gather; see `lorax_jax.statistics`.
        only: names of the adapted weights (`Slot.name`) to look at; `None` is all.
        tokens: which of the model's other arguments has the axes of a mask: its
            position, or its name if it is given by name.
        materialize: as in `adapt`; nothing can be gathered where a dense weight is.

    Returns:
        A `Capture`.

    Example:
        >>> import lorax_jax as lj
        >>> params = {"w": jnp.ones((3, 2))}
        >>> fn = lambda params, x: x @ params["w"]
        >>> x = jnp.arange(6.0).reshape(2, 3)
        >>> plan = lj.plan(lj.LoraConfig("w", rank=1), params, fn, (x,))
        >>> gather = capture(fn, plan, stat=lj.statistics.Moments())
        >>> gather(gather.init(), params, x)["w"].mean.tolist()
        [1.5, 2.5, 3.5]
    """
    slots = tuple(slot for slot in chosen(plan, only) if not slot.role.lookup)
    if not slots:
        raise CaptureError(
            "No weight of the plan has inputs that a statistic could be taken of: they "
            "are looked up by number, or trained whole."
        )
    return Capture(fn, slots, stat, tokens, allowed(materialize, "primal"))


@dataclasses.dataclass(frozen=True)
class Capture:
    """A function that gathers a statistic; see `capture`.

    Attributes:
        fn: the model.
        slots: the leaves whose inputs are taken.
        statistic: what is gathered.
        tokens: the argument whose axes a mask has.
        options: what is allowed where there is no factored form.
    """

    fn: Callable[..., Any]
    slots: tuple[Slot, ...]
    statistic: Statistic
    tokens: int | str
    options: Options

    def init(self) -> Stats:
        """The statistics of no batch."""

        def zeros(slot: Slot) -> Any:
            state = self.statistic.init(slot.sides[0])
            lead = (*slot.layers, *slot.apart)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *x.shape)), state)

        return Stats(
            states={slot.name: zeros(slot) for slot in self.slots},
            witness=no_witnesses(self.slots),
            mixed=jnp.zeros((), bool),
            batches=jnp.zeros((), jnp.int32),
            statistic=self.statistic,
        )

    def __call__(
        self, stats: Stats, params: Any, *args: Any, mask: Any = None, **kwargs: Any
    ) -> Stats:
        """Takes one batch in.

        Args:
            stats: of the batches before; see `init`.
            params: the parameters; never changed.
            args: the model's other arguments.
            mask: which tokens count, and how much: an array with the leading axes of
                the argument `tokens`, `(batch, sequence)` for one. Where each token is
                in a layer's inputs is followed through the model. `None` counts all.
            kwargs: the model's keyword arguments.

        Returns:
            The statistics with the batch.

        Raises:
            CaptureError: if a weight's inputs are not reached, or a mask cannot be
                followed to them; or if parameters are types and not values.
            TransformError: where the weight is used in a way that has no rows.
        """
        check_values(params)
        leaves = dict(_paths.flatten(params, is_leaf=is_weight)[0])
        self._check(leaves)
        mask = None if mask is None else checked_mask(mask)
        bound = self._tapped(stats, params, leaves, mask)
        prepare = None
        if mask is not None:
            inputs = self._followed_from(bound, args, kwargs, jnp.shape(mask))
            prepare = functools.partial(_follow_tokens, inputs, jnp.ndim(mask))
        notes = observe(self.fn, (bound, *args), kwargs, self.options, prepare)
        sums = self._sums(notes)
        states = {
            slot.name: self._updated(slot, stats[slot.name], sums[slot.name])
            for slot in self.slots
        }
        seen = witnesses(self.slots, params)
        first = stats.batches == 0
        return Stats(
            states,
            {n: jnp.where(first, seen[n], stats.witness[n]) for n in seen},
            stats.mixed | (~first & differ(stats.witness, seen)),
            stats.batches + 1,
            self.statistic,
        )

    def run(
        self,
        params: Any,
        batches: Iterable[Any],
        *,
        stats: Stats | None = None,
        progress: bool = False,
        save: str | os.PathLike | None = None,
        every: int = 100,
    ) -> Stats:
        """Takes many batches in, compiled, with a progress bar and a file to resume.

        Args:
            params: the parameters.
            batches: each a tuple of the model's arguments, a mapping of its keyword
                arguments (and `mask`), or its only argument.
            stats: what was gathered before; `None` is nothing.
            progress: show a progress bar.
            save: a file that the state is written to every so often. If it is there at
                the start, the batches that it holds are skipped, so the same call goes
                on where it was stopped.
            every: after how many batches it is written.

        Raises:
            CaptureError: if there are no batches, a value is no number, or the file
                holds other statistics.
        """
        return run(self, params, batches, stats, progress, save, every)

    def _check(self, leaves: Mapping[str, Any]) -> None:
        for slot in self.slots:
            leaf = leaves.get(slot.role.path)
            if leaf is None or tuple(leaf.shape) != slot.shape:
                raise CaptureError(
                    f"The plan has {slot.role.path!r} with shape {slot.shape}, and "
                    f"`params` has {getattr(leaf, 'shape', 'no such leaf')}. Give the "
                    "parameters that the plan was made on."
                )

    def _tapped(
        self, stats: Stats, params: Any, leaves: Mapping[str, Any], mask: Any
    ) -> Any:
        """The parameters with a tap on each adapted leaf."""
        taps: dict[str, list[Tap]] = {}
        for slot in self.slots:
            context = mapped(self.statistic, self.statistic.context, stats[slot.name])
            tap = _tap(slot, self.statistic, context, mask)
            taps.setdefault(slot.role.path, []).append(tap)
        flat, tree = _paths.flatten(params, is_leaf=is_weight)
        for i, (path, leaf) in enumerate(flat):
            if path in taps:
                base, terms = leaf, ()
                if isinstance(leaf, Adapted):
                    base, terms = leaf.base, leaf.terms
                flat[i] = path, Adapted(base, (*terms, *taps[path]), Origin(path))
        return jax.tree.unflatten(tree, [leaf for _, leaf in flat])

    def _followed_from(
        self, bound: Any, args: Any, kwargs: Any, shape: tuple[int, ...]
    ) -> list[int]:
        """Which inputs of the model's jaxpr have the axes of a mask of this shape."""
        if isinstance(self.tokens, str):
            chosen = kwargs.get(self.tokens)
        elif not args and len(kwargs) == 1:
            (chosen,) = kwargs.values()
        else:
            chosen = args[self.tokens] if self.tokens < len(args) else None
        wanted = {id(leaf) for leaf in jax.tree.leaves(chosen)}
        leaves = jax.tree.leaves(((bound, *args), kwargs), is_leaf=is_weight)
        moving = [leaf for leaf in leaves if is_dynamic(leaf)]
        found = [
            i
            for i, leaf in enumerate(moving)
            if id(leaf) in wanted and jnp.shape(leaf)[: len(shape)] == shape
        ]
        if not found:
            shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(chosen)]
            raise CaptureError(
                f"`mask` has the shape {shape}, and no array of the argument "
                f"{self.tokens!r} begins with these axes: {shapes or 'there is none'}. "
                "Say which argument holds the tokens: `capture(..., tokens=)`."
            )
        return found

    def _sums(self, notes: list[Note]) -> dict[str, list[Any]]:
        """The sums of each slot: the matrices of each note, added up."""
        found: dict[str, list[Any]] = {slot.name: [] for slot in self.slots}
        for note in notes:
            count = sum(n for _, n in note.about.slots)
            index = note.index.reshape(-1)

            def added(values, index=index, count=count, lead=note.index.ndim):
                values = values.reshape(index.size, *values.shape[lead:])
                zeros = jnp.zeros((count, *values.shape[1:]), values.dtype)
                return zeros.at[index].add(values, mode="drop")

            sums, start = jax.tree.map(added, note.values), 0
            for name, n in note.about.slots:
                part = slice(start, start + n)
                found[name].append(jax.tree.map(lambda x, part=part: x[part], sums))
                start += n
        unseen = [name for name, all_ in found.items() if not all_]
        if unseen:
            raise CaptureError(
                f"Nothing was multiplied by {shorten(unseen)} while the function ran. "
                "Give `capture` the function that the plan was made with, and to its "
                "result the arguments that make it use these weights."
            )
        return found

    def _updated(self, slot: Slot, state: Any, sums: list[Any]) -> Any:
        total = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *sums)
        lead = (*slot.layers, *slot.apart)
        total = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), total)
        return mapped(self.statistic, self.statistic.update, state, total)


def _follow_tokens(
    inputs: list[int], ndim: int, jaxpr: Any, values: list[Any]
) -> list[Any]:
    """Tells the taps among `values` where the tokens of some inputs are."""
    followed = follow(jaxpr, {i: tuple(range(ndim)) for i in inputs})

    def told(value: Any) -> Any:
        if not isinstance(value, Adapted):
            return value
        terms = tuple(
            dataclasses.replace(term, tokens=followed)
            if isinstance(term, Tap)
            else term
            for term in value.terms
        )
        return Adapted(value.base, terms, value.origin)

    return list(map(told, values))


def _tap(slot: Slot, statistic: Statistic, context: Any, mask: Any) -> Tap:
    role, leaf = slot.role, slot.role.leaf

    def numbers(sizes: tuple[int, ...], axes: tuple[int, ...]) -> Factor:
        return Factor(
            jnp.arange(math.prod(sizes), dtype=jnp.int32).reshape(sizes), axes
        )

    def along(array: jax.Array) -> Factor:
        lead = len(slot.layers) + len(slot.apart)
        own = array.shape[lead:]
        array = array.reshape(*slot.layers, math.prod(slot.apart), *own)
        names = (APART, *(f"entry {i}" for i in range(len(own))))
        return Factor(array, (*leaf.stacked, *names))

    entry = numbers(leaf.sizes(slot.shape, leaf.inputs), leaf.inputs)
    expert = numbers(slot.experts, role.batch[role.stack :])
    entries = None
    if role.part is not None:
        # Numbers from 1 up, for what is not of the part is filled with zeros.
        counted = role.lay(Factor(expert.array + 1, expert.axes), slot.shape)
        expert = Factor(
            jnp.where(counted.array > 0, counted.array - 1, NONE), counted.axes
        )
        taken = role.part.take(entry, slot.shape).array
        entries = Factor(taken.reshape(-1), ("entry",))
    count = math.prod(slot.layers) * math.prod(slot.apart)
    return Tap(
        layer=numbers(slot.layers, leaf.stacked),
        expert=expert,
        entry=entry,
        entries=entries,
        output=Factor(
            jnp.zeros(leaf.sizes(slot.shape, leaf.outputs), bool), leaf.outputs
        ),
        base=Factor(jnp.zeros((), jnp.int32), ()),
        context=jax.tree.map(along, context),
        mask=None if mask is None else Factor(jnp.asarray(mask), ()),
        about=About(((slot.name, count),), statistic),
        size=entry.array.size,
        apart=math.prod(slot.apart),
        groups=role.groups,
        use=role.use,
    )
