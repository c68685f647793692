"""What runs along an array's axes: stretches of the axes that are followed.

The rules of `_follow_rules.py` are about whole arrays; here is what they do to one axis
(`join`, `cut`, `grow`, `turn`) or to all of them at once (`regroup`).
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence

from ..structure import reshape


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Entries of a followed axis, in an order that is known.

    Entry `i` belongs to position `start + i * step` of the axis. Where an axis was
    split, each part is a stretch, and the positions of the parts add. A position
    outside of the axis is padding.

    Attributes:
        label: which followed axis; `None` for entries that belong to none.
        size: how many entries there are, more than one.
        step: how far apart they are.
        start: the position of the first.
        whole: how many entries all parts have together; `size` where it was not split.
        extent: how many positions the followed axis has.
    """

    label: Hashable
    size: int
    step: int = 1
    start: int = 0
    whole: int = 0
    extent: int = 0

    def split(self, outer: int) -> tuple["Stretch", "Stretch"]:
        """Two stretches, the first of `outer` entries, that are this one together."""
        inner = self.size // outer
        if self.label is None or outer == 1 or inner == 1:
            parts = [_apart(n) for n in (outer, inner)]
            if self.label is not None:
                parts[outer == 1] = self
            return parts[0], parts[1]
        return (
            dataclasses.replace(self, size=outer, step=self.step * inner),
            dataclasses.replace(self, size=inner, start=0),
        )


@dataclasses.dataclass(frozen=True)
class Lost:
    """Tokens run along the axis, and nothing says which is where.

    Attributes:
        reason: what happened to them.
        source: the line of the user's program where it did.
    """

    reason: str
    source: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """The label of what one device holds of a stretch.

    Attributes:
        of: the stretch, over all devices.
        names: the mesh axes that divide it.
    """

    of: Stretch
    names: tuple[str, ...]


# What runs along one axis, outermost first: `()` where no followed axis does.
Axis = tuple[Stretch, ...] | Lost
Axes = tuple[Axis, ...]
Lose = Callable[[str], Lost]


def _apart(size: int) -> Stretch:
    return Stretch(None, size)


def entire(label: Hashable, size: int) -> tuple[Stretch, ...]:
    """All of a followed axis. One entry alone needs no following."""
    return (Stretch(label, size, whole=size, extent=size),) if size > 1 else ()


def tidy(stretches: Iterable[Stretch]) -> tuple[Stretch, ...]:
    """The same entries as few stretches."""
    out: list[Stretch] = []
    for new in stretches:
        if new.size == 1:
            continue
        old = out[-1] if out else None
        if old and old.label is None and new.label is None:
            out[-1] = _apart(old.size * new.size)
        elif (
            old
            and (old.label, old.whole) == (new.label, new.whole)
            and new.label is not None
            and old.step == new.step * new.size
        ):
            size, start = old.size * new.size, old.start + new.start
            out[-1] = dataclasses.replace(new, size=size, start=start)
        else:
            out.append(new)
    return tuple(out) if any(one.label is not None for one in out) else ()


def join(axes: Sequence[Axis], lose: Lose) -> Axis:
    """What runs along an axis that several arrays share, entry by entry.

    One that belongs to no token goes with any; where two orders meet, or one is lost,
    the result is lost.
    """
    found: Axis = ()
    for axis in axes:
        if isinstance(found, Lost):
            return found
        if isinstance(axis, Lost) or not found:
            found = axis
        elif axis and axis != found:
            found = _both(list(found), list(axis), lose)
    return found


def _both(left: list[Stretch], right: list[Stretch], lose: Lose) -> Axis:
    out = []
    while left and right:
        size = min(left[0].size, right[0].size)
        parts = []
        for side in (left, right):
            first = side.pop(0)
            if first.size % size:
                return lose("two arrays of other orders meet")
            outer, inner = first.split(size)
            parts.append(outer)
            if inner.size > 1:
                side.insert(0, inner)
        known = [part for part in parts if part.label is not None]
        if len(known) == 2 and known[0] != known[1]:
            return lose("two arrays of other orders meet")
        out.append((known or parts)[0])
    return tidy(out)


def cut(axis: Axis, size: int, start: int, stop: int, step: int, lose: Lose) -> Axis:
    """What runs along a slice of an axis of `size` entries."""
    if (start, stop, step) == (0, size, 1) or axis == () or isinstance(axis, Lost):
        return axis
    count = max(0, -(-(stop - start) // step))
    if count <= 1:
        return ()
    first, rest = axis[0], axis[1:]
    inner = math.prod(one.size for one in rest)
    if rest and (step != 1 or start % inner or stop % inner):
        return lose("a part of them is taken that cuts across another axis")
    new = _window(first, start // inner, count // inner, step)
    if new is None:
        return lose("a part of them is taken after they were split")
    return tidy((new, *rest))


def grow(axis: Axis, size: int, low: int, high: int, lose: Lose) -> Axis:
    """What runs along an axis of `size` entries with padding before and behind."""
    if (low, high) == (0, 0) or axis == () or isinstance(axis, Lost):
        return axis
    first, rest = axis[0], axis[1:]
    inner = math.prod(one.size for one in rest)
    if first.label is None or low % inner or high % inner:
        return lose("they are padded along an axis of something else too")
    low, high = low // inner, high // inner
    if first.size + low + high <= 0:
        return ()
    new = _window(first, -low, first.size + low + high, 1)
    if new is None:
        return lose("they are padded after they were split")
    return tidy((new, *rest))


def _window(old: Stretch, start: int, size: int, step: int) -> Stretch | None:
    if old.label is None or size == 1:
        return _apart(size)
    if old.size != old.whole:
        return None
    moved = old.start + old.step * start
    return Stretch(old.label, size, old.step * step, moved, size, old.extent)


def turn(axis: Axis) -> Axis:
    """What runs along an axis in reverse."""
    if isinstance(axis, Lost):
        return axis
    return tidy(
        one
        if one.label is None
        else dataclasses.replace(
            one, step=-one.step, start=one.start + (one.size - 1) * one.step
        )
        for one in axis
    )


def append(pieces: Sequence[Axis], sizes: Sequence[int], lose: Lose) -> Axis:
    """What runs along pieces one behind the other: one piece if each goes on."""
    if len(pieces) == 1 or all(piece == () for piece in pieces):
        return pieces[0]
    out: Stretch | None = None
    for piece, size in zip(pieces, sizes, strict=True):
        if size == 0:
            continue
        if isinstance(piece, Lost):
            return piece
        if len(piece) != 1 or piece[0].whole != size:
            return lose("they are put beside something else")
        new = piece[0]
        if out is None:
            out = new
            continue
        following = out.start + out.step * out.size
        if (new.label, new.step, new.start) != (out.label, out.step, following):
            return lose("pieces of them are put together in another order")
        size = out.size + new.size
        out = dataclasses.replace(out, size=size, whole=size)
    return (out,) if out else ()


def regroup(
    axes: Axes, old: tuple[int, ...], new: tuple[int, ...], lose: Lose
) -> list[Axis]:
    """What runs along the axes of a row-major reshape, from shape `old` to `new`."""
    out: list[Axis] = [()] * len(new)
    if math.prod(old) == 0:
        return out
    for group in reshape(old, new).groups:
        found = _distribute([axes[i] for i in group.old], group, old, lose)
        for j, axis in zip(group.new, found, strict=True):
            out[j] = axis if new[j] > 1 else ()
    return out


def _distribute(axes, group, old, lose: Lose) -> list[Axis]:
    """The stretches of a group's old axes, dealt out to its new ones."""
    if all(axis == () for axis in axes):
        return [()] * len(group.new)
    lost = next((axis for axis in axes if isinstance(axis, Lost)), None)
    if lost is not None:
        return [lost] * len(group.new)
    row = []
    for i, axis in zip(group.old, axes, strict=True):
        row += axis or [_apart(old[i])]
    row = _merge_apart(row)
    out: list[Axis] = []
    for size in group.sizes:
        taken = []
        while size > 1:
            first = row.pop(0)
            here = math.gcd(first.size, size)
            if here != min(first.size, size):
                lost = lose(f"a reshape to {group.sizes} mixes them with another axis")
                return [lost] * len(group.new)
            outer, inner = first.split(here)
            taken.append(outer)
            size //= here
            if inner.size > 1:
                row.insert(0, inner)
        out.append(tidy(taken))
    return out


def _merge_apart(row: list[Stretch]) -> list[Stretch]:
    out: list[Stretch] = []
    for one in row:
        if out and out[-1].label is None and one.label is None:
            one = _apart(out.pop().size * one.size)
        if one.size > 1:
            out.append(one)
    return out
