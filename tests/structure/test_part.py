"""Parts of a leaf: boxes in a view of it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import on_device, primitives
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_jax.structure import RANK, Factor, Part, Run

R = 2


def some_part(draw):
    """A leaf with inputs and outputs, a part of it, and which axes are inputs."""
    axes, shape = [], []
    for _ in range(draw(st.integers(2, 3))):
        sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        shape.append(math.prod(sizes))
        axes.append(draw(st.sampled_from([None, tuple(_run(draw, n) for n in sizes)])))
    most = len(shape) - 1
    inputs = draw(st.sets(st.integers(0, most), min_size=1, max_size=most))
    return Part("p", tuple(axes)), tuple(shape), tuple(sorted(inputs))


def _run(draw, size):
    start = draw(st.integers(0, size - 1))
    return Run(
        size, start, draw(st.integers(start + 1, size)), draw(st.integers(1, size))
    )


def boxed(part, shape):
    """The shape of the view, and the part's index in it."""
    view, box = [], []
    for n, runs in zip(shape, part.axes, strict=True):
        for run in runs or [Run(n, 0, n)]:
            view.append(run.size)
            box.append(slice(run.start, run.stop, run.step))
    return view, tuple(box)


def drawn(seed, part, shape, axes):
    """A factor of the part along these axes of the leaf, integers that are not zero."""
    along = part.viewed(axes)
    sizes = [part.shape(shape)[axis] for axis in along]
    values = np.random.default_rng(seed).choice([-3, -2, -1, 1, 2, 3], [*sizes, R])
    return Factor(on_device(values), (*along, RANK))


def product(a, b, axes):
    """The sum over the rank of two factors, as an array with these axes."""
    names = [*range(axes), RANK]
    return np.einsum(
        np.asarray(a.array),
        [names.index(axis) for axis in a.axes],
        np.asarray(b.array),
        [names.index(axis) for axis in b.axes],
        range(axes),
    )


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_laid_factors_make_the_laid_product(data):
    """Zeros around A and around B are zeros around A B, and the part is recovered."""
    part, shape, inputs = some_part(data.draw)
    outputs = tuple(i for i in range(len(shape)) if i not in inputs)
    a, b = drawn(0, part, shape, inputs), drawn(1, part, shape, outputs)
    view, box = boxed(part, shape)
    wanted = np.zeros(view, np.float32)
    wanted[box] = product(a, b, len(view))
    whole = Factor(on_device(wanted.reshape(shape)), tuple(range(len(shape))))

    @jax.jit
    def run(a, b, whole):
        laid = part.lay(a, shape), part.lay(b, shape)
        return laid, [part.take(factor, shape) for factor in (*laid, whole)]

    (laid_a, laid_b), (back_a, back_b, back) = run(a, b, whole)
    assert set(laid_a.axes) == {*inputs, RANK} and set(laid_b.axes) == {*outputs, RANK}
    found = product(laid_a, laid_b, len(shape))
    np.testing.assert_array_equal(found, wanted.reshape(shape))
    np.testing.assert_array_equal(back.array, product(a, b, len(view)))
    for factor, back in ((a, back_a), (b, back_b)):
        assert back.axes == factor.axes
        np.testing.assert_array_equal(back.array, factor.array)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_shapes(data):
    part, shape, inputs = some_part(data.draw)
    view, box = boxed(part, shape)
    assert part.fits(shape) and part.view(shape) == tuple(view)
    assert part.shape(shape) == np.zeros(view)[box].shape
    assert part.leaf_shape(part.shape(shape)) == shape
    assert part.merged(part.viewed(inputs)) == inputs
    assert part.among([1]).without([1]) == part
    assert part.fits((*shape, 1)) is False
    if any(runs is not None for runs in part.axes):
        assert not part.fits([n + 1 for n in shape])


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 24), st.data())
def test_overlaps(size, data):
    """Two parts of an axis, each in a view of its own."""
    sizes = st.sampled_from(
        [(n, size // n) for n in range(1, size + 1) if size % n == 0]
    )
    found = []
    for name in "ab":
        split = data.draw(sizes)
        runs = tuple(_run(data.draw, n) for n in split)
        part = Part(name, (None, runs))
        taken = np.zeros((1, *split), bool)
        taken[boxed(part, (1, size))[1]] = True
        found.append((part, taken.reshape(-1)))
    (one, mine), (other, theirs) = found
    assert one.overlaps(other, (1, size)) == bool((mine & theirs).any())


def test_the_transpose_is_a_slice():
    """A gradient of what was laid needs no scatter."""
    part = Part("p", (None, (Run(4, 0, 4), Run(6, 1, 6, 2), Run(3, 1, 2))))
    factor = drawn(0, part, (5, 72), (1,))

    def total(array):
        return jnp.sum(part.lay(Factor(array, factor.axes), (5, 72)).array ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(total))(factor.array)
    assert "scatter" not in " ".join(primitives(jaxpr))
    np.testing.assert_array_equal(jax.grad(total)(factor.array), 2 * factor.array)


@pytest.mark.parametrize(
    "run",
    [Run(48, 3, 48, 9), Run(48, 0, 48, 8), Run(8, 1, 8, 3), Run(16, 2, 13, 2)],
    ids=str,
)
@pytest.mark.parametrize("devices", [2, 4])
def test_runs_over_devices(run, devices):
    """XLA divides a pad with holes wrongly: laid and taken values must not show it."""
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))
    sharded = NamedSharding(mesh, P(None, "d"))
    whole = np.arange(1.0, 2 * run.size + 1, dtype=np.float32).reshape(2, run.size)
    taken = whole[:, run.start : run.stop : run.step]
    laid = np.zeros_like(whole)
    laid[:, run.start : run.stop : run.step] = taken

    def on_mesh(fn, x, out=None):
        return np.asarray(jax.jit(fn, out_shardings=out)(x))

    across = jax.device_put(whole, sharded)
    np.testing.assert_array_equal(on_mesh(lambda x: run.take(x, 1), across), taken)
    lay = lambda x: run.lay(x, 1)  # noqa: E731
    np.testing.assert_array_equal(on_mesh(lay, taken, sharded), laid)
    back = on_mesh(lambda x: jax.linear_transpose(lay, taken)(x)[0], across)
    np.testing.assert_array_equal(back, taken)
