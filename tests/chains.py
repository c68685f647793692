"""What models do to a weight: steps drawn at random, and what each does to an array.

Values are small integers in float32, so that every equality is exact.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from helpers import on_device
from hypothesis import strategies as st
from jax import lax

from lorax_jax.adapters import LowRank
from lorax_jax.structure import (
    RANK,
    Along,
    Broadcast,
    Cast,
    Factor,
    Group,
    Place,
    Reshape,
    Scale,
    Transpose,
    reshape,
)

R, MOST_AXES, MOST_ENTRIES = 2, 6, 200


def whole(seed, shape):
    """Integers from -3 to 3, none of them zero."""
    values = np.random.default_rng(seed).choice([-3, -2, -1, 1, 2, 3], shape)
    return on_device(values)


def make(shape, a, b, scale=(), seed=0):
    """A term whose factors run along these axes of a weight."""

    def factor(i, axes):
        sizes = [R if axis == RANK else shape[axis] for axis in axes]
        return Factor(whole((seed, i), sizes), tuple(axes))

    return LowRank(factor(0, a), factor(1, b), factor(2, scale))


def dense(term, shape):
    """The product of all factors, summed over the rank: slow and obvious."""
    axes = list(range(len(shape)))
    operands: list[Any] = [np.ones(shape), axes]
    for factor in term.factors():
        names = [len(shape) if axis == RANK else axis for axis in factor.axes]
        assert factor.array.shape == tuple([*shape, R][name] for name in names)
        operands += [np.asarray(factor.array, np.float64), names]
    return np.einsum(*operands, axes)


@dataclasses.dataclass
class Step:
    """One thing that a model does to a weight.

    Attributes:
        op: what the library is told.
        dense: what happens to the dense weight.
        refusal: what the error says where no term expresses the result.
    """

    op: Any
    dense: Callable[[np.ndarray], np.ndarray]
    refusal: str | None = None


@dataclasses.dataclass
class Weight:
    """A shape, and which factors vary along each axis that is longer than 1."""

    shape: tuple[int, ...]
    holders: tuple[frozenset[str], ...]

    @property
    def long(self):
        """Axes that hold something."""
        return [axis for axis, n in enumerate(self.shape) if n > 1]


# The kinds of step: each draws one, and says what weight it makes.


def transposed(draw, w):
    order = tuple(draw(st.permutations(range(len(w.shape)))))
    after = Weight(*(tuple(x[i] for i in order) for x in (w.shape, w.holders)))
    return Step(Transpose(order), lambda x: x.transpose(order)), after


def merged(draw, w):
    """Two neighbours become one, as heads do."""
    if len(w.shape) < 2:
        return None
    at = draw(st.integers(0, len(w.shape) - 2))
    size = w.shape[at] * w.shape[at + 1]
    return _reshaped(w, (*w.shape[:at], size, *w.shape[at + 2 :]))


def cut_anew(draw, w):
    """Neighbouring axes are split, or merged and split elsewhere."""
    start = draw(st.integers(0, max(len(w.shape) - 2, 0)))
    stop = start + draw(st.sampled_from([2, 1, 3]))
    size, run = math.prod(w.shape[start:stop]), []
    while size > 1 and not draw(st.booleans()):
        run.append(draw(st.sampled_from([n for n in (2, 3, 5, 7) if size % n == 0])))
        size //= run[-1]
    run = draw(st.permutations([*run, size]))
    if draw(st.integers(0, 3)) == 0:
        run.insert(draw(st.integers(0, len(run))), 1)
    return _reshaped(w, (*w.shape[:start], *run, *w.shape[stop:]))


def _reshaped(w, new):
    holders, refusal = [frozenset()] * len(new), None
    for old, made in runs(w.shape, new):
        held = {w.holders[axis] for axis in old}
        if len(held) > 1:
            refusal = "a reshape merges axes .*, of which a factor holds only"
        for axis in made:
            holders[axis] = next(iter(held))
    step = Step(reshape(w.shape, new), lambda x: x.reshape(new), refusal)
    return step, Weight(new, tuple(holders))


def runs(old, new):
    """Old and new axes that cover the same entries, between strides that agree."""

    def strides(shape):
        return {math.prod(shape[i:]) for i in range(len(shape) + 1)}

    for high, low in itertools.pairwise(sorted(strides(old) & strides(new))[::-1]):
        yield tuple(
            [
                i
                for i, n in enumerate(shape)
                if n > 1 and low <= math.prod(shape[i + 1 :]) < high
            ]
            for shape in (old, new)
        )


def squeezed(draw, w):
    dropped = [i for i, n in enumerate(w.shape) if n == 1 and draw(st.booleans())]
    kept = [i for i in range(len(w.shape)) if i not in dropped]
    groups = tuple(Group((i,), (j,), (w.shape[i],)) for j, i in enumerate(kept))
    after = Weight(*(tuple(x[i] for i in kept) for x in (w.shape, w.holders)))
    return Step(Reshape(groups), lambda x: x.squeeze(tuple(dropped))), after


def broadcast(draw, w):
    """New axes anywhere; axes of size 1 may be stretched."""
    count = len(w.shape) + draw(st.integers(0, 2))
    places = draw(st.permutations(range(count)))
    at = tuple(sorted(places[: len(w.shape)]))
    shape = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    holders = [frozenset()] * count
    for old, new in enumerate(at):
        if w.shape[old] > 1:
            shape[new], holders[new] = w.shape[old], w.holders[old]
    shape = tuple(shape)

    def stretch(x):
        inner = [x.shape[at.index(i)] if i in at else 1 for i in range(count)]
        return np.broadcast_to(x.reshape(inner), shape)

    return Step(Broadcast(at, shape), stretch), Weight(shape, tuple(holders))


def _along(w, axis, map, change, fills=False):
    shape = change(np.empty(w.shape)).shape
    refusal = None
    if fills and not w.holders[axis]:
        refusal = "a padded axis is one that no factor runs along"
    return Step(Along(axis, map, fills), change, refusal), Weight(shape, w.holders)


def sliced(draw, w):
    if not w.long:
        return None
    axis = draw(st.sampled_from(w.long))
    start = draw(st.integers(0, w.shape[axis] - 1))
    stop = draw(st.integers(start + 1, w.shape[axis]))
    stride = draw(st.integers(1, 2))
    at = (slice(None),) * axis + (slice(start, stop, stride),)
    return _along(
        w,
        axis,
        lambda x, i: lax.slice_in_dim(x, start, stop, stride, i),
        lambda x: x[at],
    )


def gathered(draw, w):
    if not w.long:
        return None
    axis = draw(st.sampled_from(w.long))
    rows = draw(st.lists(st.integers(0, w.shape[axis] - 1), min_size=1, max_size=4))
    return _along(
        w,
        axis,
        lambda x, i: jnp.take(x, np.array(rows), axis=i),
        lambda x: x.take(rows, axis=axis),
    )


def flipped(draw, w):
    if not w.long:
        return None
    axis = draw(st.sampled_from(w.long))
    return _along(w, axis, lambda x, i: lax.rev(x, (i,)), lambda x: np.flip(x, axis))


def padded(draw, w):
    """As when weights are fused, each of them stands among zeros."""
    if not w.long:
        return None
    axis = draw(st.sampled_from(w.long))
    low, high = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))

    def widths(x, i):
        return [(low * (j == i), high * (j == i)) for j in range(x.ndim)]

    def pad(x, i):
        return lax.pad(x, jnp.float32(0), [(*pair, 0) for pair in widths(x, i)])

    return _along(w, axis, pad, lambda x: np.pad(x, widths(x, axis)), fills=True)


def scaled(draw, w):
    """By a number, or by values along some axes; multiplied or divided, exactly."""
    axes = tuple(axis for axis in w.long if draw(st.booleans()))
    values = whole(draw(st.integers(0, 99)), [w.shape[axis] for axis in axes])
    if divides := draw(st.booleans()):
        values = on_device(np.exp2(np.clip(values, -1, 1)))
    by, here = (lax.div, np.divide) if divides else (lax.mul, np.multiply)
    missing = tuple(i for i in range(len(w.shape)) if i not in axes)
    refusal = None
    if not any(all(f in w.holders[axis] for axis in axes) for f in "ab"):
        refusal = "the multiplier runs along axes .*, which no single factor holds"
    step = Step(
        Scale(lambda x, v: by(x, jnp.broadcast_to(v, x.shape)), values, axes),
        lambda x: here(x, np.expand_dims(np.asarray(values), missing)),
        refusal,
    )
    return step, w


def cast(draw, w):
    return Step(Cast(draw(st.sampled_from(["bfloat16", "float32"]))), lambda x: x), w


def placed(draw, w):
    def lay_out(array, axes):
        assert array.ndim == len(axes)
        return array

    return Step(Place(lay_out), lambda x: x), w


KINDS = [
    transposed,
    merged,
    cut_anew,
    squeezed,
    broadcast,
    sliced,
    gathered,
    flipped,
    padded,
    scaled,
    cast,
    placed,
]


def program(draw):
    """A term of any layout, and steps that a model takes."""
    sizes = st.lists(st.sampled_from([2, 3, 4, 1, 6]), min_size=2, max_size=4)
    shape = tuple(draw(sizes.filter(lambda x: math.prod(x) <= MOST_ENTRIES)))
    # A runs along some axes, B along others, often neighbours; both along those of a
    # stack, where scales may differ; neither along what was broadcast.
    held, kinds = [], ["a", "b", "ab", "abs", ""]
    for _ in shape:
        kind = frozenset(draw(st.sampled_from(kinds)))
        held.append(held[-1] if held and draw(st.booleans()) else kind)
    axes = {f: [i for i, names in enumerate(held) if f in names] for f in "abs"}
    a, b = (draw(st.permutations([*axes[f], RANK])) for f in "ab")
    term = make(shape, a, b, axes["s"], seed=draw(st.integers(0, 99)))
    weight, steps = Weight(shape, tuple(held)), []
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=3, max_size=6)):
        step, after = kind(draw, weight) or (None, weight)
        if math.prod(after.shape) <= MOST_ENTRIES and len(after.shape) <= MOST_AXES:
            steps += [step] * (step is not None)
            weight = weight if step is None or step.refusal else after
    return shape, term, steps
