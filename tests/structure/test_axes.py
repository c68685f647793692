"""How a reshape is read: which axes split, which merge, and which only move."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorax_jax.structure import Group, Reshape, Unstructured, reshape

SIZES = st.lists(st.sampled_from([1, 1, 2, 3, 4, 6]), max_size=5)


@st.composite
def reshapes(draw):
    """Two shapes of one size: the factors of one, merged anew and mixed with ones."""
    old = draw(SIZES.filter(lambda old: math.prod(old) <= 200))
    if draw(st.booleans()):
        primes = [p for n in old for p in {4: (2, 2), 6: (2, 3)}.get(n, (n,))]
    else:  # in any order, so that few of the old boundaries remain
        primes = draw(st.permutations(old))
    cuts = [draw(st.booleans()) for _ in primes]
    new = [1] * (not all(cuts[:1]))
    for prime, cut in zip(primes, cuts, strict=True):
        new = [*new, prime] if cut else [*new[:-1], new[-1] * prime]
    for at in draw(st.lists(st.integers(0, len(new)), max_size=2)):
        new.insert(at, 1)
    return tuple(old), tuple(new)


def boundaries(shape):
    """How many entries, in row-major order, one step of each axis strides over."""
    return {math.prod(shape[i:]) for i in range(len(shape) + 1)}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(shapes=reshapes())
@example(shapes=((2, 1, 3), (6,)))
@example(shapes=((4, 3), (2, 6)))
def test_groups_are_the_smallest_that_keep_row_major_order(shapes):
    old, new = shapes
    groups = reshape(old, new).groups
    # Each axis is in one group, in order; only axes of size 1 may be in none.
    for shape, axes in (
        (old, [axis for group in groups for axis in group.old]),
        (new, [axis for group in groups for axis in group.new]),
    ):
        assert axes == sorted(set(axes))
        assert {axis for axis, n in enumerate(shape) if n > 1} <= set(axes)
    for group in groups:
        assert group.sizes == tuple(new[axis] for axis in group.new)
        assert math.prod(group.sizes) == math.prod(old[axis] for axis in group.old)
    # Old and new strides that agree are where a group may end, and all do.
    large = [group for group in groups if math.prod(group.sizes) > 1]
    assert len(large) == len(boundaries(old) & boundaries(new)) - 1


@pytest.mark.parametrize(
    "old, new, groups",
    [
        ((6, 4), (6, 4), [((0,), (0,)), ((1,), (1,))]),
        ((6, 4), (6, 2, 2), [((0,), (0,)), ((1,), (1, 2))]),
        ((3, 2, 4), (3, 8), [((0,), (0,)), ((1, 2), (1,))]),
        ((6, 4), (24,), [((0, 1), (0,))]),
        ((6, 4), (4, 6), [((0, 1), (0, 1))]),
        # Axes of size 1: dropped, made, paired, and passed over inside a group.
        ((1, 6), (6, 1), [((1,), (0,))]),
        ((1, 6), (1, 2, 3), [((0,), (0,)), ((1,), (1, 2))]),
        ((2, 1, 3), (6,), [((0, 2), (0,))]),
        ((6,), (2, 1, 3), [((0,), (0, 1, 2))]),
        ((1, 1), (), []),
        ((), (1,), []),
    ],
)
def test_reshapes(old, new, groups):
    found = reshape(old, new)
    assert isinstance(found, Reshape)
    assert found.groups == tuple(
        Group(i, j, tuple(new[k] for k in j)) for i, j in groups
    )


@pytest.mark.parametrize("old, new", [((0, 3), (3, 0)), ((2, 0), (0,)), ((0,), (0,))])
def test_empty_weights_have_no_groups(old, new):
    with pytest.raises(Unstructured, match="an empty weight is reshaped"):
        reshape(old, new)
