"""Every kind of adapter, as what it makes of one weight. All take the same exam.

To enter a kind: add a builder that binds it to a weight, and say what the dense weight
is by the slow reference.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from helpers import numbers, on_device, random_adapter

import lorax_jax as lj
from lorax_jax.adapters import Fixed, takes_inputs

# Ranks that no axis of any layout has, so that shapes tell factors from weights.
RANKS = (5, 7)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    Attributes:
        adapters: `adapters(key, params, role)` gives the adapters to bind.
        takes: which layouts make sense for it.
        refuses: names of layouts that it refuses, with a clear error.
        alone: whether it is one adapter. Several at once answer the questions about
            values; the others are settled by each of them.
    """

    name: str
    adapters: Callable
    takes: Callable = lambda layout: True
    refuses: tuple[str, ...] = ()
    alone: bool = True

    def bind(self, params, adapters):
        return lj.bind(params, *adapters)


def delta(w, role, train, fixed):
    """`s A B` laid out as `w`, less `s A0 B0` where there are starting factors."""
    a, b = ((train if name in train else fixed)[name] for name in ("a", "b"))
    whole = _product(w, role, a, b, fixed["scale"])
    if "a0" not in fixed:
        return whole
    return whole - _product(w, role, fixed["a0"], fixed["b0"], fixed["scale"])


def _product(w, role, a, b, scale):
    letters = "abcdefgh"[: w.ndim]

    def names(axes):
        return "".join(letters[axis] for axis in axes)

    batch, outputs = names(role.batch), names(role.outputs)
    one = "r"
    if role.groups > 1:  # an A for each output, which is that of its group
        sizes = role.sizes(w.shape, role.outputs)
        a = jnp.repeat(a, math.prod(sizes) // role.groups, axis=-2)
        a = a.reshape(*a.shape[:-2], *sizes, a.shape[-1])
        one = f"{outputs}r"
    spec = (
        f"{batch}{names(role.inputs)}{one},{batch}r{outputs},"
        f"{names(role.stacked)}->{letters}"
    )
    return jnp.einsum(spec, a, b, scale)


def _lora(w, base, role, train, fixed):
    del base
    return w + delta(w, role, train, fixed)


def _dora(w, base, role, train, fixed):
    """The norm is that of the base and this adapter's own delta."""
    change = delta(w, role, train, fixed)
    norm = jnp.sqrt(jnp.sum((base + change) ** 2, axis=role.inputs, keepdims=True))
    order = (*role.batch, *role.outputs)
    magnitude = train["magnitude"]
    magnitude = jnp.transpose(magnitude, [order.index(axis) for axis in sorted(order)])
    gain = jnp.expand_dims(magnitude, role.inputs) / jax.lax.stop_gradient(norm)
    return gain * (w + change)


def _rows(w, base, role, train, fixed):
    del base
    index = (slice(None),) * role.inputs[0] + (fixed["ids"],)
    return w.at[index].set(jnp.moveaxis(train["rows"], 0, role.inputs[0]))


def box_of(part, shape):
    """The shape of a leaf's view, and the index of a part in it."""
    view, box = [], []
    for size, runs in zip(shape, part.axes, strict=True):
        for run in runs or [None]:
            view.append(size if run is None else run.size)
            box.append(slice(run and run.start, run and run.stop, run and run.step))
    return view, tuple(box)


def taken(w, role):
    """What is adapted of a leaf."""
    if role.part is None:
        return w
    view, box = box_of(role.part, w.shape)
    return w.reshape(view)[box]


SLOWLY = {"lora": _lora, "dora": _dora, "rows": _rows}


def dense(base, adapters):
    """The dense weight that the adapters make of `base`, slowly, differentiably."""
    w = base
    for adapter in adapters:
        for name, fixed in adapter.fixed.items():
            role = fixed.role
            one = taken(w, role), taken(base, role), role
            one = SLOWLY[role.kind](*one, adapter.train[name], fixed)
            if role.part is not None:
                view, box = box_of(role.part, w.shape)
                one = w.reshape(view).at[box].set(one).reshape(w.shape)
            w = one
    return w


def _one(key, params, role):
    return [random_adapter(key, params, [role], rank=RANKS[0])]


def _two(key, params, role):
    first, second = jax.random.split(key)
    return [
        random_adapter(first, params, [role], rank=RANKS[0]),
        random_adapter(second, params, [role], rank=RANKS[1], scale=-1.5),
    ]


def _from_start(key, params, role):
    """Both factors moved from starting factors that are not zero."""
    first, second = jax.random.split(key)
    (adapter,), (start,) = _one(first, params, role), _one(second, params, role)
    begun = {f"{name}0": start.train[role.name][name] for name in ("a", "b")}
    moved = {
        name: on_device(np.asarray(begun[f"{name}0"]) + 0.5 * np.asarray(value))
        for name, value in adapter.train[role.name].items()
    }
    fixed = Fixed(role, {**adapter.fixed[role.name], **begun})
    return [lj.Adapter({role.name: moved}, {role.name: fixed})]


def _frozen(key, params, role):
    """B among what does not move."""
    (adapter,) = _one(key, params, role)
    train = dict(adapter.train[role.name])
    fixed = Fixed(role, {**adapter.fixed[role.name], "b": train.pop("b")})
    return [lj.Adapter({role.name: train}, {role.name: fixed})]


def _magnitudes(key, params, role):
    role = dataclasses.replace(role, kind="dora")
    (adapter,) = _one(key, params, role)
    weight = taken(np.asarray(params[role.path]), role)
    norm = np.sqrt(np.sum(weight**2, axis=role.inputs, keepdims=True))
    order = (*role.batch, *role.outputs, *role.inputs)
    norm = np.transpose(norm, order)
    norm = np.squeeze(norm, tuple(range(-len(role.inputs), 0)))
    change = 1 + 0.2 * np.asarray(numbers(jax.random.fold_in(key, 9), norm.shape))
    adapter.train[role.name]["magnitude"] = on_device(norm * change)
    fixed = adapter.fixed[role.name]
    adapter.fixed[role.name] = Fixed(role, {**fixed, "norm": on_device(norm)})
    return [adapter]


def _lora_then_dora(key, params, role):
    first, second = jax.random.split(key)
    return _one(first, params, role) + _magnitudes(second, params, role)


def _two_rows(key, params, role):
    role = dataclasses.replace(role, kind="rows")
    width = role.sizes(params[role.path].shape, role.outputs)
    rows = numbers(key, (2, *width))
    fixed = Fixed(role, {"ids": jnp.array([1, 4])})
    return [lj.Adapter({role.name: {"rows": rows}}, {role.name: fixed})]


# Written over along inputs, where no output's gain may touch what others wrote; groups
# of unlike sizes in every batch; a declared batch axis that is summed over.
_NO_DORA = ("overwritten", "ragged_batch", "batch_contracted")


def _has_columns(layout):
    """Whether DoRA is defined for it: not in groups, nor for some of the inputs."""
    role = layout.role
    parted = role.part is not None and takes_inputs(role)
    return role.groups == 1 and not parted


def _is_table(layout):
    return layout.role.lookup and layout.role.part is None


KINDS = [
    Kind("lora", _one),
    Kind("two_lora", _two, alone=False),
    Kind("from_start", _from_start, alone=False),
    Kind("frozen_b", _frozen, alone=False),
    Kind("dora", _magnitudes, takes=_has_columns, refuses=_NO_DORA),
    Kind(
        "lora_dora",
        _lora_then_dora,
        takes=_has_columns,
        refuses=_NO_DORA,
        alone=False,
    ),
    Kind("rows", _two_rows, takes=_is_table),
]
