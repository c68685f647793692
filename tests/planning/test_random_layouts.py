"""Random layouts: the roles are read back, and factors give what the matrix gives.

A weight of known roles is stored in a drawn order, its neighbours merged or not, its
layers stacked along any axis; the model takes it apart again in a drawn way before it
multiplies. Values are small integers in float32, so that every equality is exact.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from reference import dense

import lorax_jax as lj

RANK, BATCH = 2, 3


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a weight is stored and used.

    Attributes:
        kinds: for each axis of the weight taken apart, a letter: `l` its layers, `e`
            experts, `i` and `j` inputs, `o` and `p` outputs.
        sizes: their sizes.
        stored: groups of those axes, in the order of storage; a group is one axis.
        loop: how the layers are run: `scan`, or `index` for one after the other.
        cut: whether outputs are cut in two before the product.
        flip: whether the weight is the left operand of the product.
    """

    kinds: str
    sizes: tuple[int, ...]
    stored: tuple[str, ...]
    loop: str
    cut: bool
    flip: bool

    @property
    def shape(self):
        """The shape in storage."""
        return tuple(math.prod(self.size(k) for k in group) for group in self.stored)

    def size(self, kind):
        return self.sizes[self.kinds.index(kind)]

    def roles(self, letters):
        """Stored axes that are made of these."""
        return tuple(i for i, g in enumerate(self.stored) if set(g) <= set(letters))

    def apart(self, w):
        """The weight with its axes apart, layers first, the others as stored."""
        order = "".join(self.stored)
        w = w.reshape([self.size(kind) for kind in order])
        if "l" not in order:
            return w, order
        at = order.index("l")
        return w.transpose([at, *(i for i in range(w.ndim) if i != at)]), order[
            :at
        ] + order[at + 1 :]

    def layer(self, w, x, order, xp):
        """One product, or two that are put together again."""
        x_axes = "b" + "".join(k for k in self.kinds if k in "eij")
        out = "".join(k for k in "beop" if k == "b" or k in self.kinds)
        if self.flip:
            spec = f"{order},{x_axes}->{out}"
        else:
            spec = f"{x_axes},{order}->{out}"

        def product(w):
            return xp.einsum(spec, *((w, x) if self.flip else (x, w)))

        if not self.cut:
            return product(w)
        at, n = order.index("o"), self.size("o") // 2
        first, second = (
            w[(slice(None),) * at + (part,)] for part in (slice(n), slice(n, None))
        )
        return xp.concatenate([product(second), product(first)], out.index("o"))

    def model(self, w, x):
        w, order = self.apart(w)
        if "l" not in self.kinds:
            return self.layer(w, x, order, jnp)
        if self.loop == "scan":
            step = lambda c, w: (c, self.layer(w, x, order, jnp))  # noqa: E731
            return lax.scan(step, 0, w)[1]
        return jnp.stack([self.layer(w[i], x, order, jnp) for i in range(w.shape[0])])

    def expected(self, w, x):
        """The same in NumPy, one layer after the other."""
        w, order = self.apart(w)
        if "l" not in self.kinds:
            return self.layer(w, x, order, np)
        return np.stack([self.layer(layer, x, order, np) for layer in w])


@st.composite
def layouts(draw):
    kinds = draw(st.sampled_from(["", "l"])) + draw(st.sampled_from(["", "e"]))
    kinds += draw(st.sampled_from(["i", "ij"])) + draw(st.sampled_from(["o", "op"]))
    sizes = tuple(draw(st.sampled_from([2, 3, 4])) for _ in kinds)
    order = draw(st.permutations(kinds))
    # Neighbours of one role may be stored as one axis, as heads and their features are.
    groups = [order[0]]
    for before, kind in itertools.pairwise(order):
        alike = {before, kind} in ({"i", "j"}, {"o", "p"})
        if alike and draw(st.booleans()):
            groups[-1] += kind
        else:
            groups.append(kind)
    return Layout(
        kinds,
        sizes,
        tuple(groups),
        loop=draw(st.sampled_from(["scan", "index"])),
        cut=draw(st.booleans()),
        flip=draw(st.booleans()),
    )


def whole(seed, shape):
    """Integers from -3 to 3."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layout=layouts())
def test_roles_and_answers(layout):
    params = {"w": whole(0, layout.shape)}
    x = whole(1, [BATCH, *(layout.size(k) for k in layout.kinds if k in "eij")])

    def fn(params, x):
        return layout.model(params["w"], x)

    plan = lj.plan(lj.LoraConfig("w|.*/w|w/.*", rank=RANK), params, fn, (x,))
    (slot,) = plan.slots
    role = slot.role
    assert set(role.inputs) == set(layout.roles("ij"))
    assert set(role.outputs) == set(layout.roles("op"))
    assert role.batch == (*layout.roles("l"), *layout.roles("e"))
    assert role.stack == len(layout.roles("l"))
    assert len(plan) == (layout.size("l") if "l" in layout.kinds else 1)

    def init():
        return lj.init(plan, params, key=jax.random.key(0))

    shapes = jax.eval_shape(init).train["w"]
    factors = {k: whole(i, v.shape) for i, (k, v) in enumerate(shapes.items(), 2)}

    @jax.jit
    def run(params, factors, x):
        fixed = init().fixed
        bound = lj.bind(params, lj.Adapter({"w": factors}, fixed))
        return lj.adapt(fn)(bound, x), fixed["w"]["scale"]

    answer, scale = run(params, factors, x)
    built = dense(
        params["w"],
        factors["a"],
        factors["b"],
        scale,
        role.inputs,
        role.outputs,
        role.batch,
    )
    np.testing.assert_array_equal(answer, layout.expected(built, x))
