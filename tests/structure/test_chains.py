"""What a model does to a weight: `op(dense(term)) == dense(op(term))`, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import dense, make, program, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from lorax_jax.adapters import LowRank
from lorax_jax.structure import (
    RANK,
    Along,
    Broadcast,
    Factor,
    Group,
    Reshape,
    Scale,
    Transpose,
    Unstructured,
    reshape,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_chain(data):
    shape, term, steps = program(data.draw)
    expected = dense(term, shape)

    @jax.jit
    def run(term):
        for step in steps:
            if step.refusal is None:
                term = term.apply(step.op)
            else:
                with pytest.raises(Unstructured, match=step.refusal):
                    term.apply(step.op)
        return term, term.dense(jnp.zeros(after))

    for step in steps:
        if step.refusal is None:
            expected = step.dense(expected)
    after = expected.shape
    found, delta = run(term)
    np.testing.assert_array_equal(dense(found, after), expected)
    np.testing.assert_array_equal(delta, expected)


def check(shape, term, *steps):
    """The same, for steps given as pairs of an operation and a function."""
    expected = dense(term, shape)
    for op, change in steps:
        term, expected = term.apply(op), change(expected)
    np.testing.assert_array_equal(dense(term, expected.shape), expected)
    return term


def cut(axis, start, stop):
    at = (slice(None),) * axis + (slice(start, stop),)
    return (
        Along(axis, lambda x, i: lax.slice_in_dim(x, start, stop, axis=i)),
        lambda x: x[at],
    )


D, KV, GROUP, HEAD = 3, 2, 2, 2


GQA = (D, KV * (GROUP + 2) * HEAD)  # each key-value head after its query heads


@pytest.mark.parametrize(
    "start, stop", [(0, GROUP), (GROUP, GROUP + 1), (GROUP + 1, GROUP + 2)], ids="qkv"
)
@pytest.mark.parametrize("transpose", [False, True])
def test_interleaved_queries_keys_and_values(start, stop, transpose):
    """A fused projection of grouped-query attention, taken apart inside each group."""
    split, rows = (D, KV, GROUP + 2, HEAD), KV * (stop - start) * HEAD
    parts = (D, KV, stop - start, HEAD)
    steps = [
        (reshape(GQA, split), lambda w: w.reshape(split)),
        cut(2, start, stop),
        (reshape(parts, (D, rows)), lambda w: w.reshape(D, rows)),
    ]
    shape, term = GQA, make(GQA, (0, RANK), (RANK, 1))
    if transpose:
        shape, term = GQA[::-1], make(GQA[::-1], (1, RANK), (RANK, 0))
        steps = [(Transpose((1, 0)), lambda w: w.T), *steps]
    check(shape, term, *steps)


def test_heads_shared_by_a_group_stay_apart_but_do_not_merge():
    """Repeating heads of B makes an axis that no factor holds: it cannot be merged."""
    shape, shared = (D, KV, HEAD), (D, KV, GROUP, HEAD)
    term = check(
        shape,
        make(shape, (0, RANK), (RANK, 1, 2)),
        (
            Broadcast((0, 1, 3), shared),
            lambda w: np.broadcast_to(w[:, :, None], shared),
        ),
    )
    with pytest.raises(Unstructured, match=r"\(1, 2\), of which .* only \(1,\)"):
        term.apply(reshape(shared, (D, KV * GROUP, HEAD)))
    # Repeated by a gather, they stay one axis.
    rows = np.repeat(np.arange(KV), GROUP)
    check(
        shape,
        make(shape, (0, RANK), (RANK, 1, 2)),
        (
            Along(1, lambda x, i: jnp.take(x, rows, axis=i)),
            lambda w: np.repeat(w, GROUP, 1),
        ),
    )


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["front", "middle", "behind"])
def test_one_layer_of_a_stack(axis):
    """Chosen by an index, and the axis is gone; or scanned, and the rest moves up."""
    layers, rest = 3, (2, 4)
    shape = (*rest[:axis], layers, *rest[axis:])
    inner, outer = (i for i in range(3) if i != axis)
    term = make(shape, (axis, inner, RANK), (axis, RANK, outer), (axis,))
    kept = (Group((inner,), (0,), (2,)), Group((outer,), (1,), (4,)))
    check(
        shape,
        term,
        cut(axis, 1, 2),
        (Reshape(kept), lambda w: w.squeeze(axis)),
    )
    front = (Transpose((axis, inner, outer)), lambda w: np.moveaxis(w, axis, 0))
    stack = check(shape, term, front)
    for i, layer in enumerate(np.moveaxis(dense(term, shape), axis, 0)):
        a, b, scale = parts = [
            Factor(f.array[i], f.shift(-1).axes[1:]) for f in stack.factors()
        ]
        assert [f.axes for f in parts] == [(0, RANK), (RANK, 1), ()]
        np.testing.assert_array_equal(dense(LowRank(a, b, scale), rest), layer)


def test_merging_layers_and_experts():
    """A scale for each layer cannot become one for each layer and expert unbuilt."""
    shape, merged = (2, 3, 2, 2), (6, 2, 2)
    op = reshape(shape, merged), lambda w: w.reshape(merged)
    check(shape, make(shape, (0, 1, 2, RANK), (0, 1, RANK, 3)), op)
    with pytest.raises(Unstructured, match=r"\(0, 1\), of which .* only \(0,\)"):
        make(shape, (0, 1, 2, RANK), (0, 1, RANK, 3), (0,)).apply(op[0])


@pytest.mark.parametrize(
    "axes, refused",
    [((), False), ((0,), False), ((1,), False), ((2,), False), ((1, 2), False)]
    + [((0, 1), True), ((0, 1, 2), True), ((3,), True), ((2, 3), True)],
    ids=str,
)
def test_multipliers_are_of_one_factor(axes, refused):
    """Rows or columns of a weight are rescaled, but not its entries one by one."""
    shape = 2, 3, 2, 4  # the last axis was broadcast: the weight is constant along it
    term = make(shape, (RANK, 0), (2, RANK, 1))
    values = whole(5, [shape[axis] for axis in axes])
    op = Scale(lambda x, v: x * jnp.broadcast_to(v, x.shape), values, axes)
    if refused:
        with pytest.raises(Unstructured, match=r"axes \(.*\), which no single factor"):
            term.apply(op)
    else:
        along = [shape[i] if i in axes else 1 for i in range(4)]
        check(shape, term, (op, lambda w: w * np.reshape(values, along)))


def test_weights_fused_at_run_time():
    """A concatenation is a sum of terms, each among zeros."""
    shapes = (D, 2), (D, 3), (D, 1)
    total, before = np.zeros((D, 6)), 0
    for seed, shape in enumerate(shapes):
        low, high = before, 6 - before - shape[1]

        def pad(x, i, low=low, high=high):
            edges = [(low, high, 0) if j == i else (0, 0, 0) for j in range(x.ndim)]
            return lax.pad(x, jnp.float32(0), edges)

        term = make(shape, (0, RANK), (RANK, 1), seed=seed)
        total += dense(term.apply(Along(1, pad, fills=True)), (D, 6))
        before += shape[1]
    parts = [
        dense(make(s, (0, RANK), (RANK, 1), seed=i), s) for i, s in enumerate(shapes)
    ]
    np.testing.assert_array_equal(total, np.concatenate(parts, axis=1))
