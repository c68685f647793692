"""The matrices that initializers read are those that A and B are factors of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bases import FORMS
from helpers import assert_close, numbers
from kinds import box_of, delta
from layouts import LAYOUTS

from lorax_jax.adapters import Role
from lorax_jax.planning._layer_matrices import layer_matrices
from lorax_jax.planning._sites import Site, Slot, part_indices

RANK = 2


def slot_of(role, shape):
    site = Site("w", "w", (), None, shape, role, RANK, 1.0, 1.0, "w", True, 0.0, 0)
    count = len(list(part_indices(role, shape)))
    return Slot(role, shape, jnp.float32, (site,) * count)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout(layout, key):
    """A B of random factors, laid into the leaf and read again, layer by layer."""
    role, shape = layout.role, layout.weight
    slot = slot_of(role, shape)
    count, (d_in, d_out) = len(slot.sites), slot.sides
    a = numbers(key, (count, *slot.apart, d_in, RANK))
    b = numbers(jax.random.key(1), (count, *slot.apart, RANK, d_out))
    train = dict(zip("ab", slot.arrays(a, b), strict=True))
    own = jnp.zeros(role.shape(shape))
    leaf = delta(own, role, train, {"scale": jnp.ones(slot.layers)})
    if role.part is not None:
        view, box = box_of(role.part, shape)
        leaf = jnp.full(view, jnp.nan).at[box].set(leaf).reshape(shape)
    for i in range(count):
        found = layer_matrices(leaf, i, role)
        assert_close(found, np.asarray(a[i]) @ np.asarray(b[i]), length=RANK)


@pytest.mark.parametrize("form", FORMS[1:], ids=lambda form: form.name)
def test_packed_bases(form, key):
    """Each layer as it is unpacked, by a number that is only known at run time."""
    role = Role("w", inputs=(1,), outputs=(2,), batch=(0,), stack=1)
    base = form.make(numbers(key, (4, 6, 5)), role)
    expected = form.dense(base)
    read = jax.jit(lambda base, i: layer_matrices(base, i, role))
    for i in range(4):
        np.testing.assert_array_equal(read(base, i), expected[i])
