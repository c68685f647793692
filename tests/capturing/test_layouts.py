"""What is gathered is right in every layout of the exam that the transform takes."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import numbers

import lorax_jax as lj
from lorax_jax.capturing import capture
from lorax_jax.statistics import Moments

sys.path.append(str(Path(__file__).parents[1] / "exam"))
from kinds import box_of  # noqa: E402
from layouts import LAYOUTS  # noqa: E402

# Rows there are none of, and the error says why.
REFUSED = {}


def second_moments(layout, w, x, slot):
    """The slow way: rows are derivatives of results by one column of the weight."""
    role = layout.role
    jac = jax.jacrev(
        lambda w: jnp.concatenate(
            [jnp.ravel(y) for y in jax.tree.leaves(layout.fn(w, x))]
        )
    )(w)
    if role.part is not None:
        view, box = box_of(role.part, w.shape)
        jac = jac.reshape(jac.shape[0], *view)[(slice(None), *box)]
    order = [1 + axis for axis in (*role.batch, *role.inputs, *role.outputs)]
    jac = np.asarray(jnp.transpose(jac, (0, *order)), np.float64)
    d_in, d_out = slot.sides
    lead = (*slot.layers, *slot.experts)
    jac = jac.reshape(jac.shape[0], *lead, d_in, role.groups, d_out)
    jac = jac[..., np.argmax(np.square(jac).sum(tuple(range(jac.ndim - 1))))]
    jac = np.moveaxis(jac, -1, -2)  # groups before inputs
    found = np.einsum("n...i,n...j->...ij", jac, jac)
    return found if role.groups > 1 else found[..., 0, :, :]


def is_linear(layout, w, x):
    one, two = layout.fn(w, x), layout.fn(2 * w, x)
    return all(
        np.allclose(2 * np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-4)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_second_moments(layout):
    keys = jax.random.split(jax.random.key(3), 2)
    w = numbers(keys[0], layout.weight) / 2.0
    if layout.ids:
        pytest.skip("looked up")
    x = numbers(keys[1], layout.x)
    config = lj.LoraConfig({r"(.*/)?w": layout.rule}, rank=1, tie="shared")
    fn = lambda p, x: layout.fn(p["w"], x)  # noqa: E731
    plan = lj.plan(config, {"w": w}, fn, (x,))
    gather = capture(fn, plan, stat=Moments())
    state = jax.jit(gather)(gather.init(), {"w": w}, x)[plan.slots[0].name]
    if not is_linear(layout, w, x):
        pytest.skip("not linear")
    got = (
        state.scatter
        + state.count[..., None, None]
        * state.mean[..., :, None]
        * state.mean[..., None, :]
    )
    expected = second_moments(layout, w, x, plan.slots[0])
    np.testing.assert_allclose(
        got, expected, rtol=1e-3, atol=1e-2 * np.abs(expected).max()
    )
