"""Notes that terms take while a function runs, and how they leave inner jaxprs.

A term may compute more than its part of the product: a statistic of the operand, say.
What it found cannot be kept in a Python list, for inside a `jit` or a `scan` it is a
value of that trace alone. So each body collects the notes of its own, returns them as
further results, and the rule for the call passes them on: as they are from a `jit`, one
for each step from a `scan`.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Note:
    """Something that was found out, once or many times.

    Attributes:
        about: what it is about; hashable.
        index: which of the things `about` each entry belongs to, integers of any shape;
            the largest integer is none of them.
        values: a pytree; each leaf's leading axes are those of `index`.
    """

    about: Any = dataclasses.field(metadata={"static": True})
    index: jax.Array
    values: Any


_page: contextvars.ContextVar[list[Note] | None] = contextvars.ContextVar(
    "notes", default=None
)


@contextlib.contextmanager
def noting() -> Iterator[list[Note]]:
    """Collects the notes that are taken inside."""
    notes: list[Note] = []
    token = _page.set(notes)
    try:
        yield notes
    finally:
        _page.reset(token)


def take(*notes: Note) -> None:
    """Puts notes where the innermost `noting` finds them; nobody asks, none is kept."""
    page = _page.get()
    if page is not None:
        page += notes


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where a weight meets what it is multiplied by.

    Attributes:
        eqn: the equation.
        operand: which of its operands is not the weight.
        producer: finds the equation that made a variable, or `None`.
    """

    eqn: Any
    operand: int
    producer: Any

    def repeats(self) -> frozenset[str]:
        """Mesh axes of a `shard_map` along which the operand is everywhere the same.

        JAX declares a value to vary along all axes that the weight varies along, just
        before they meet. This looks behind such declarations.
        """
        atom = self.eqn.invars[self.operand]
        return _varying(atom) - self._differs(atom, {})

    def _differs(self, atom: Any, known: dict[Any, frozenset]) -> frozenset[str]:
        varying = _varying(atom)
        maker = self.producer(atom) if varying else None
        if maker is None or not maker.invars:
            return varying
        if atom not in known:
            known[atom] = varying  # an answer for whoever asks meanwhile
            sources = [self._differs(x, known) for x in maker.invars]
            known[atom] = varying & frozenset().union(*sources)
        return known[atom]


def _varying(atom: Any) -> frozenset[str]:
    return getattr(atom.aval.manual_axis_type, "varying", frozenset())


_meeting: contextvars.ContextVar[Meeting | None] = contextvars.ContextVar(
    "meeting", default=None
)


@contextlib.contextmanager
def consuming(eqn: Any, operand: int, producer: Any) -> Iterator[None]:
    """Says where the weight that is consumed inside meets its operand."""
    token = _meeting.set(Meeting(eqn, operand, producer))
    try:
        yield
    finally:
        _meeting.reset(token)


def meeting() -> Meeting:
    """Where the weight that is being consumed meets its operand."""
    found = _meeting.get()
    assert found is not None, "asked for while a weight is consumed"
    return found


def agreed(branches: Sequence[Sequence[Note]]) -> list[Note]:
    """The notes that every one of several branches can return: all that any takes.

    Args:
        branches: the types of the notes of each.
    """
    found: dict[Any, Note] = {}
    for notes in branches:
        for key, note in _keyed(notes):
            found.setdefault(key, note)
    return list(found.values())


def filled(notes: Sequence[Note], wanted: Sequence[Note]) -> list[Note]:
    """One branch's notes in the order of `wanted`, zeros for those it does not take.

    A note of zeros is about nothing: notes are added up.
    """
    mine = dict(_keyed(notes))
    return [
        mine[key] if key in mine else jax.tree.map(_zeros, note)
        for key, note in _keyed(wanted)
    ]


def _keyed(notes: Sequence[Note]) -> Iterator[tuple[Any, Note]]:
    """Notes with what tells them apart: the n-th of each form."""
    count: dict[Any, int] = {}
    for note in notes:
        leaves, tree = jax.tree.flatten(note)
        form = tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        count[form] = count.get(form, -1) + 1
        yield (form, count[form]), note


def _zeros(kind: Any) -> jax.Array:
    return jnp.zeros(kind.shape, kind.dtype)
