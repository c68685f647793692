"""Products of labelled arrays against dense ones: exact, for entries are integers."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations, on_device
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

from lorax_jax.structure import (
    RANK,
    Dot,
    Factor,
    Take,
    arrange,
    cost,
    product,
    wide,
)

SIZES = 2, 3, 1, 4  # of a weight's axes
R = 5


def whole(seed, shape):
    """Integers from -3 to 3, none of them zero."""
    values = np.random.default_rng(seed).choice([-3, -2, -1, 1, 2, 3], shape)
    return on_device(values)


def einsum(wanted, shape, *pieces):
    """The sum over labels that are not wanted, of arrays given with their labels."""
    labels = dict.fromkeys(itertools.chain(wanted, *(piece[1] for piece in pieces)))
    number = {label: i for i, label in enumerate(labels)}
    operands: list[Any] = [np.ones(shape), [number[x] for x in wanted]]
    for array, names in pieces:
        operands += [np.asarray(array, np.float64), [number[x] for x in names]]
    return np.einsum(*operands, [number[x] for x in wanted])


def factors(draw, ndim):
    """A and B along any axes of a weight: each, both or neither along every axis."""
    held = [draw(st.sampled_from(["a", "b", "ab", ""])) for _ in range(ndim)]
    return tuple(
        tuple(draw(st.permutations([RANK, *(i for i in range(ndim) if f in held[i])])))
        for f in "ab"
    )


@st.composite
def dots(draw):
    """Any `dot_general` of an operand with a weight, and the axes of its factors."""
    ndim = draw(st.integers(0, 4))
    order = draw(st.permutations(range(ndim)))
    n_contract = draw(st.integers(0, ndim))
    n_batch = draw(st.integers(0, ndim - n_contract))
    n_shared = n_contract + n_batch
    x_ndim = n_shared + draw(st.integers(0, 2))
    x_order = draw(st.permutations(range(x_ndim)))
    pairs = list(zip(x_order, order, strict=False))[:n_shared]
    kwargs = {
        "contract": tuple(pairs[:n_contract]),
        "batch": tuple(pairs[n_contract:]),
        "weight_first": draw(st.booleans()),
        "x_ndim": x_ndim,
        "weight_ndim": ndim,
    }
    return kwargs, *factors(draw, ndim)


def size(label):
    return R if label == RANK else 3 if isinstance(label, tuple) else SIZES[label]


def shape_of(labels):
    return tuple(size(label) for label in labels)


def flops(jaxpr):
    """Multiply-adds of the matrix products in a jaxpr."""
    total = 0
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            summed = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            total += math.prod(eqn.outvars[0].aval.shape) * summed
    return total


MATMUL = {"contract": ((1, 0),), "batch": (), "weight_first": False, "x_ndim": 2}
MATMUL["weight_ndim"] = 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=dots())
@example(case=(MATMUL, (0, RANK), (RANK, 1)))
@example(case=(MATMUL, (1, RANK), (RANK, 0)))
@example(case=(MATMUL, (RANK,), (RANK, 1)))  # constant along what is contracted
def test_dot_in_two_thin_products(case):
    """Factors in either order, on either side: the dense product, at the cost said."""
    kwargs, *axes = case
    dims = Dot(**kwargs)
    weight_shape = SIZES[: dims.weight_ndim]
    pieces = [(whole(i, shape_of(names)), names) for i, names in enumerate(axes)]
    x = whole(2, shape_of(dims.x_labels))

    dense = einsum(tuple(range(dims.weight_ndim)), weight_shape, *pieces)
    numbers: Any = [
        ([x for x, _ in pairs], [w for _, w in pairs])
        for pairs in (dims.contract, dims.batch)
    ]
    out = dims.out_labels

    def model(x):
        w = jnp.asarray(dense, jnp.float32)
        if dims.weight_first:
            return lax.dot_general(w, x, tuple(pair[::-1] for pair in numbers))
        return lax.dot_general(x, w, tuple(numbers))

    def thin(x, first, second, factor_first=False):
        t, labels = product(
            x,
            dims.x_labels,
            *first,
            keep={*second[1], *out},
            factor_first=factor_first,
        )
        assert t.shape == shape_of(labels)
        t, labels = product(
            t, labels, *second, keep=set(out), factor_first=factor_first
        )
        assert t.shape == shape_of(labels)
        return arrange(t, labels, out, shape_of(out))

    orders = list(itertools.permutations(pieces))
    ways = list(itertools.product(orders, (False, True)))

    @jax.jit
    def run(x):
        return model(x), [thin(x, *order, factor_first=side) for order, side in ways]

    expected, found = run(x)
    for y in found:
        np.testing.assert_array_equal(y, expected)

    sizes = {label: size(label) for label in dims.x_labels}
    sizes |= {label: size(label) for _, names in pieces for label in names}
    for first, second in orders:
        jaxpr = jax.make_jaxpr(lambda x, a=first, b=second: thin(x, a, b))(x)
        assert flops(jaxpr) == cost(sizes, dims.x_labels, first[1], second[1], out)


@pytest.mark.parametrize(
    "spec, contract, batch, x_labels, out_labels",
    [
        ("sd,dh->sh", [(1, 0)], [], [("x", 0), 0], [("x", 0), 1]),
        ("sd,hd->sh", [(1, 1)], [], [("x", 0), 1], [("x", 0), 0]),
        ("snh,nhd->sd", [(1, 0), (2, 1)], [], [("x", 0), 0, 1], [("x", 0), 2]),
        ("ebd,edf->ebf", [(2, 1)], [(0, 0)], [0, ("x", 1), 1], [0, ("x", 1), 2]),
        ("bed,def->ebf", [(2, 0)], [(1, 1)], [("x", 0), 1, 0], [1, ("x", 0), 2]),
        ("s,d->sd", [], [], [("x", 0)], [("x", 0), 0]),
    ],
)
def test_labels_of_known_products(spec, contract, batch, x_labels, out_labels):
    x, w = (part.split("->")[0] for part in spec.split(","))
    kwargs: dict[str, Any] = {"contract": tuple(contract), "batch": tuple(batch)}
    kwargs |= {"x_ndim": len(x), "weight_ndim": len(w)}
    dims = Dot(weight_first=False, **kwargs)
    assert dims.x_labels == tuple(x_labels)
    assert dims.out_labels == tuple(out_labels)
    # With the weight on the left, its free axes come before the operand's.
    flipped = Dot(weight_first=True, **kwargs)
    free = [label for label in out_labels if label not in dict(batch).values()]
    by_side = sorted(free, key=lambda label: isinstance(label, tuple))
    assert flipped.out_labels == (*[w for _, w in batch], *by_side)
    assert flipped.x_labels == dims.x_labels


def test_what_the_two_orders_of_a_projection_cost():
    tokens, d_in, d_out, rank = 7, 64, 8, 2
    sizes = {("x", 0): tokens, 0: d_in, 1: d_out, RANK: rank}
    x, out = (("x", 0), 0), (("x", 0), 1)
    down = cost(sizes, x, (0, RANK), (RANK, 1), out)
    assert down == tokens * d_in * rank + tokens * rank * d_out
    # B first shares nothing with the operand, and makes an array of all axes.
    up = cost(sizes, x, (RANK, 1), (0, RANK), out)
    assert up == 2 * tokens * d_in * d_out * rank


def test_a_product_is_as_precise_as_asked():
    x, w = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)

    def run(x, w):
        return product(
            x,
            (("x", 0), 0),
            w,
            (0, 1),
            keep=set(),
            precision=lax.Precision.HIGHEST,
            output_dtype=jnp.float32,
        )[0]

    (eqn,) = equations(jax.make_jaxpr(run)(x, w))
    assert eqn.params["precision"] == (lax.Precision.HIGHEST,) * 2
    assert eqn.params["preferred_element_type"] == run(x, w).dtype == jnp.float32


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_arrange(data):
    """Axes that nobody wants are summed; those that are missing are repeated."""
    everything = [0, 1, 3, RANK, ("x", 0)]
    labels = data.draw(st.permutations(everything))[: data.draw(st.integers(0, 4))]
    wanted = data.draw(st.permutations(everything))[: data.draw(st.integers(0, 4))]
    y, shape = whole(0, shape_of(labels)), shape_of(wanted)
    expected = einsum(wanted, shape, (y, labels))
    found = jax.jit(lambda y: arrange(y, labels, wanted, shape))(y)
    np.testing.assert_array_equal(found, expected)


def test_arrange_leaves_alone_what_lies_right():
    y = jnp.ones((2, 3))
    assert arrange(y, (0, 1), (0, 1), (2, 3)) is y


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_lookup_in_two_thin_steps(data):
    """Rows of A, times B, are rows of the dense table, in any order of the axes."""
    ndim = data.draw(st.integers(1, 3))
    axis = data.draw(st.integers(0, ndim - 1))
    a, b = factors(data.draw, ndim)
    if axis not in a:  # A holds the rows, and B does not
        a = (axis, *a)
    b = tuple(label for label in b if label != axis)
    ids_shape = tuple(data.draw(st.lists(st.integers(1, 2), max_size=2)))
    ids = np.random.default_rng(ndim).integers(0, SIZES[axis], ids_shape)
    ids_labels = [("x", i) for i in range(len(ids_shape))]
    rest = [i for i in range(ndim) if i != axis]
    out = data.draw(st.permutations([*ids_labels, *rest]))
    take, indices = Take(axis, tuple(out)), ids[..., None]

    pieces = [(whole(i, shape_of(names)), names) for i, names in enumerate((a, b))]
    dense = einsum(tuple(range(ndim)), SIZES[:ndim], *pieces)
    by_label = dict(zip(ids_labels, ids_shape, strict=True))
    by_label |= {i: SIZES[i] for i in rest}
    shape = tuple(by_label[label] for label in out)
    rows = np.moveaxis(dense, axis, 0)[ids]
    expected = einsum(out, shape, (rows, [*ids_labels, *rest]))

    @jax.jit
    def run(indices, down, up, table):
        thin = take.low_rank(indices, down, up, jnp.zeros(shape))
        return thin, take.dense(indices, table)

    factored = (Factor(array, names) for array, names in pieces)
    for found in run(indices, *factored, dense.astype(np.float32)):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_rows_out_of_range(axis, mode):
    """They are zeros where the model's gather fills, for they are added to its own."""
    table = jnp.moveaxis(whole(0, (3, 2, 4)), 0, axis)
    ids = jnp.array([0, 2, 3, -1])[:, None]
    rows = Take(axis, (), mode=mode).rows(ids, table, axis)
    expected = np.moveaxis(np.asarray(table), axis, 0)[[0, 2, 2, 0]]
    if mode == "fill":
        expected[2:] = 0
    np.testing.assert_array_equal(rows, expected)


def test_promises_about_the_indices_are_kept():
    take, ids = Take(0, (), sorted=True, unique=True), jnp.array([[0], [1]])
    (eqn,) = equations(jax.make_jaxpr(lambda x: take.rows(ids, x, 0))(jnp.ones((3, 2))))
    assert eqn.params["indices_are_sorted"] and eqn.params["unique_indices"]


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "int8"]
)
def test_sums_are_taken_in_float32(dtype):
    assert wide(jnp.dtype(dtype)) == jnp.float32
    assert wide(jnp.zeros(1, dtype).dtype) == jnp.float32


def test_but_in_float64_for_float64():
    assert wide(jnp.dtype("float64")) == wide(jnp.float64) == jnp.float64
