"""What is gathered is right in every layout of the exam, or refused by name."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import numbers

import lorax_jax as lj
from lorax_jax.capturing import capture
from lorax_jax.errors import TransformError
from lorax_jax.statistics import Moments

sys.path.append(str(Path(__file__).parents[1] / "exam"))
from kinds import box_of  # noqa: E402
from layouts import LAYOUTS  # noqa: E402

# Where a weight's inputs are no rows, and what the error says.
REFUSED = {
    "scaled": "inputs are rescaled",
    "padded": "inputs are padded",
    "conv_prepared": "inputs are padded",
    "while": "how many there are is not known",
    "while_const": "how many there are is not known",
    "concatenated_experts": "of which some have no statistic",
    "swapped_experts": "cannot be joined|padded",
    "overwritten": "cannot be joined|padded",
    "shard_map": "split over devices",
    "ragged_batch": "groups differ by batch",
    "part_inputs_before": "a part of the weight's inputs",
    "buffer": "cannot be joined|padded|no statistic",
    "stack_scan": "no statistic|differ",
    "stack_expanded": "no statistic|differ",
    "part_of_experts_buffer": "padded",
}

# The model multiplies the weight, or the result, by a number or a gate: rows are what
# stands beside the weight, and the slow way does not see them apart.
GATED = {"split_experts", "stack_batched", "top_k"}


def second_moments(layout, w, x, slot):
    """The slow way: of a linear model, results for one column of each weight are rows.

    Returns:
        The sum of the rows' products, shape `(*layers, *experts, *groups, d_in, d_in)`.
    """
    role = layout.role

    @jax.jit
    def results(w):
        out = jax.tree.leaves(layout.fn(w, x))
        return jnp.concatenate([jnp.ravel(leaf) for leaf in out])

    basis = jnp.eye(w.size).reshape(w.size, *w.shape)
    jac = np.stack([np.asarray(results(one), np.float64) for one in basis], -1)
    jac = jac.reshape(-1, *w.shape)
    if role.part is not None:
        view, box = box_of(role.part, w.shape)
        jac = jac.reshape(-1, *view)[(slice(None), *box)]
    order = [1 + axis for axis in (*role.batch, *role.inputs, *role.outputs)]
    d_in, d_out = slot.sides
    lead = (*slot.layers, *slot.experts)
    jac = jac.transpose(0, *order).reshape(-1, *lead, d_in, role.groups, d_out)
    used = np.square(jac).sum(tuple(range(jac.ndim - 1)))
    jac = np.moveaxis(jac[..., np.argmax(used)], -1, -2)  # groups before inputs
    found = np.einsum("n...i,n...j->...ij", jac, jac)
    return found if role.groups > 1 else found[..., 0, :, :]


def gathered(layout, w, x):
    config = lj.LoraConfig({r"(.*/)?w": layout.rule}, rank=1, tie="shared")

    def fn(params, x):
        return layout.fn(params["w"], x)

    plan = lj.plan(config, {"w": w}, fn, (x,))
    gather = capture(fn, plan, stat=Moments())
    stats = jax.jit(gather)(gather.init(), {"w": w}, x)
    return plan.slots[0], stats[plan.slots[0].name]


def is_linear(layout, w, x):
    one, two = (jax.tree.leaves(jax.jit(layout.fn)(k * w, x)) for k in (1.0, 2.0))
    return all(
        np.allclose(2 * np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-4)
        for a, b in zip(one, two, strict=True)
    )


def sheet(layout):
    keys = jax.random.split(jax.random.key(3), 2)
    return numbers(keys[0], layout.weight) / 2.0, numbers(keys[1], layout.x)


TAKEN = [x for x in LAYOUTS if not x.ids and x.name not in REFUSED]


@pytest.mark.parametrize("layout", TAKEN, ids=lambda layout: layout.name)
def test_second_moments(layout):
    w, x = sheet(layout)
    slot, state = gathered(layout, w, x)
    assert jnp.any(state.count > 0)
    mean = state.mean
    products = state.count[..., None, None] * (mean[..., :, None] * mean[..., None, :])
    got = state.scatter + products
    assert jnp.all(jnp.isfinite(got))
    if layout.name in GATED or not is_linear(layout, w, x):
        return
    expected = second_moments(layout, w, x, slot)
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(got, expected, atol=100 * eps * np.abs(expected).max())


@pytest.mark.parametrize(
    "layout", [x for x in LAYOUTS if x.name in REFUSED], ids=lambda layout: layout.name
)
def test_what_is_no_row_is_refused(layout):
    with pytest.raises(TransformError, match=REFUSED[layout.name]):
        gathered(layout, *sheet(layout))
