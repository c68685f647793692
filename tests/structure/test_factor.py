"""`Factor`: an array that knows which of its weight's axes it runs along."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    Unstructured,
    is_factor,
    reshape,
)


def factor(shape, axes):
    """Entries that all differ."""
    return Factor(jnp.arange(np.prod(shape, dtype=int)).reshape(shape), axes)


def assert_same(found, array, axes):
    assert found.axes == axes
    np.testing.assert_array_equal(found.array, array)


def test_labels_are_the_structure_and_the_array_is_the_leaf():
    f = factor((3, 2), (1, RANK))
    (path, leaf), *others = jax.tree.leaves_with_path(f)
    assert jax.tree_util.keystr(path) == ".array" and leaf is f.array and not others
    other = Factor(f.array, (RANK, 1))
    assert jax.tree.structure(f) != jax.tree.structure(other)
    assert jax.tree.structure(f) == jax.tree.structure(factor((5, 4), (1, RANK)))
    doubled = jax.jit(lambda f: jax.tree.map(lambda x: 2 * x, f))(f)
    assert_same(doubled, 2 * f.array, (1, RANK))
    # JAX puts anything at a leaf.
    assert jax.tree.unflatten(jax.tree.structure(f), [None]).array is None


def test_is_factor_stops_a_map():
    tree = {"a": factor((3,), (0,)), "x": 1.0}
    assert jax.tree.map(is_factor, tree, is_leaf=is_factor) == {"a": True, "x": False}


def test_repr_says_the_type_and_the_axes():
    assert repr(factor((3, 2), (0, RANK))) == "Factor(int32[3,2], axes=(0, 'rank'))"
    assert repr(Factor(None, ())) == "Factor(NoneType, axes=())"


def test_holds():
    f = factor((3, 2), (1, RANK))
    assert f.holds(1) and f.holds(RANK) and not f.holds(0) and not f.holds(2)


def test_shift_renumbers_the_axes_of_the_weight_alone():
    f = factor((3, 2, 4), (1, RANK, 0))
    assert_same(f.shift(1), f.array, (2, RANK, 1))
    assert_same(f.shift(1).shift(-1), f.array, f.axes)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_aligned(data):
    """One axis for each that is asked for, in that order, of size 1 where not held."""
    wanted = data.draw(st.permutations([0, 1, 2, RANK]))
    held = data.draw(st.permutations(wanted))[: data.draw(st.integers(0, 4))]
    sizes = {0: 2, 1: 3, 2: 1, RANK: 4}
    f = factor([sizes[x] for x in held], tuple(held))
    operands = [np.asarray(f.array), ["012r".index(str(x)[0]) for x in held]]
    names = ["012r".index(str(x)[0]) for x in wanted]
    expected = np.einsum(*operands, [n for n in names if n in operands[1]])
    shape = [sizes[x] if x in held else 1 for x in wanted]
    found = f.aligned(tuple(wanted))
    np.testing.assert_array_equal(found.reshape(shape), expected.reshape(shape))
    assert found.shape == (tuple(shape) if held else ())  # a scalar stays one


def test_aligned_to_too_few_axes():
    with pytest.raises(AssertionError, match=r"\(0, 'rank'\), \(0, 1\)"):
        factor((3, 2), (0, RANK)).aligned((0, 1))


def test_moving_axes_moves_no_data():
    f = factor((3, 2, 4), (2, RANK, 0))
    for op, axes in (
        (Transpose((1, 2, 0)), (1, RANK, 2)),
        (Transpose((2, 0, 1)), (0, RANK, 1)),
        (Broadcast((1, 2, 4), (7, 4, 5, 6, 3)), (4, RANK, 1)),
    ):
        found = f.apply(op)
        assert found.array is f.array and found.axes == axes


@pytest.mark.parametrize(
    "op", [Cast("bfloat16"), Scale(jnp.multiply, 2.0), Along(1, jnp.flip)]
)
def test_what_a_factor_does_not_see(op):
    """Dtypes and multipliers are its owner's affair, other axes nobody's."""
    f = factor((3, 2), (0, RANK))
    assert f.apply(op) is f


def test_along_maps_the_axis_wherever_the_factor_has_it():
    f = factor((2, 3), (RANK, 5))
    found = f.apply(Along(5, lambda x, axis: jax.lax.slice_in_dim(x, 1, 3, axis=axis)))
    assert_same(found, f.array[:, 1:], (RANK, 5))


def test_place_is_told_the_axes():
    f = factor((2, 3), (RANK, 5))
    seen = []

    def lay_out(array, axes):
        seen.append(axes)
        return array + 1

    assert_same(f.apply(Place(lay_out)), f.array + 1, (RANK, 5))
    assert seen == [(RANK, 5)]


def test_a_stretched_axis_is_let_go():
    """A factor of size 1 along an axis is constant along what it becomes."""
    f = factor((1, 2, 3), (0, RANK, 1))
    found = f.apply(Broadcast((1, 2), (4, 5, 3)))
    assert_same(found, f.array[0], (RANK, 2))
    kept = f.apply(Broadcast((1, 2), (4, 1, 3)))
    assert_same(kept, f.array, (1, RANK, 2))


def test_split_and_merge_around_the_rank():
    """Heads, in a factor that keeps the rank between them."""
    f = factor((3, 5, 4), (1, RANK, 0))  # of a weight (4, 3)
    split = f.apply(reshape((4, 3), (2, 2, 3)))
    assert_same(split, f.array.reshape(3, 5, 2, 2), (2, RANK, 0, 1))
    assert_same(split.apply(reshape((2, 2, 3), (4, 3))), f.array, f.axes)
    merged = f.apply(reshape((4, 3), (12,)))  # row-major in the weight's order
    by_hand = np.transpose(f.array, (2, 0, 1)).reshape(12, 5)
    np.testing.assert_array_equal(merged.aligned((0, RANK)), by_hand)


def test_squeezed_axes_are_dropped():
    f = factor((1, 5, 4), (0, RANK, 2))  # of a weight (1, 3, 4)
    op = Reshape((Group((1,), (0,), (3,)), Group((2,), (1,), (4,))))
    assert_same(f.apply(op), f.array[0], (RANK, 1))


@pytest.mark.parametrize("axes", [(0, RANK), (RANK, 1)])
def test_a_merge_with_an_axis_that_is_not_held(axes):
    f = factor((2, 2), axes)
    with pytest.raises(
        Unstructured,
        match=r"merges axes \(0, 1\), of which a factor holds only \([01],\)",
    ):
        f.apply(reshape((2, 2), (4,)))
    assert f.apply(reshape((2, 2, 3, 3), (2, 2, 9))) is not None  # not its axes


def test_an_unknown_operation():
    with pytest.raises(TypeError, match="rotated"):
        factor((3,), (0,)).apply("rotated")  # pyright: ignore[reportArgumentType]
