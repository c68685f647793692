"""`Replicated`: a stack of layers, some of them several times, kept once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._errors import TransformError
from ..quant import Base
from ..structure import (
    Along,
    AxisOp,
    Bilinear,
    Broadcast,
    Cast,
    Dot,
    Factor,
    Pick,
    Reshape,
    Scale,
    Transpose,
    Unstructured,
)

# The axis of the stack that counts its own layers. The weight has none like it: its
# layers are those of the index.
LAYER = "layer"

_PLAIN = (
    "Replicated layers are used in a plain function. Call it through `lj.adapt(fn)`, "
    "with an adapter or without, or build the copies with `lj.merge(params)`."
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replicated(Base):
    r"""A stack of layers seen through an index: layer $i$ is `stack[index[i]]`.

    A scan over it carries the stack as a constant and scans the index. Each step takes
    its layer out of the stack where a product uses it, and again in the backward pass,
    so that neither pass holds the layers that the index names. What acts on the whole
    (a transpose, a cast, a slice of columns) acts on the stack, once.

    Once the layer is chosen, transposes, casts and reshapes that move nothing wait for
    the product. Any other operation takes the layer out first, as a dense array, which
    the backward pass then keeps as it keeps whatever a model computes.

    Attributes:
        stack: the layers as they are; one of its axes is `LAYER`.
        index: which of them, integers; along the weight's axis of layers, until a layer
            is chosen.
        casts: floating dtypes that the layers go through when they are used, the last
            of them the model's.
    """

    stack: Factor
    index: Factor
    casts: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = {}
        for factor in (self.stack, self.index):
            sizes |= dict(zip(factor.axes, factor.array.shape, strict=True))
        return tuple(n for axis, n in sorted(sizes.items(), key=_last) if axis != LAYER)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.casts[-1]) if self.casts else self.stack.array.dtype

    @property
    def size(self) -> int:
        return self.stack.array.size

    def dense(self) -> jax.Array:
        chosen = _choose(self.stack, self.index)
        return self._cast(chosen.aligned(tuple(range(len(chosen.axes)))))

    def __getitem__(self, key: Any) -> jax.Array:
        """Layers by number, as of an array: `view[3]`, `view[[0, 2], :, 1]`.

        Raises:
            TypeError: if the layers are not picked by integers.
            IndexError: if there is no such layer.
            TransformError: in a loop of a plain function, which knows no index.
        """
        if jnp.ndim(self.index.array) != len(self.index.axes):
            raise TransformError(_PLAIN)
        keys = key if isinstance(key, tuple) else (key,)
        axis = self._layers()
        if axis is None or len(keys) <= axis or isinstance(keys[axis], slice):
            raise TypeError(
                f"Of replicated layers of shape {self.shape} some are picked by "
                f"integers along axis {axis}, and the index here is {key!r:.60}. For "
                "all of them as one array call `.dense()`, which builds the copies."
            )
        layer, count = keys[axis], self.index.array.shape[0]
        if isinstance(layer, int) and not -count <= layer < count:  # or a loop runs on
            raise IndexError(f"There are {count} layers, and none has number {layer}.")
        ordered = self.stack.aligned((*range(axis), LAYER, *self._rest(axis)))
        chosen = (*keys[:axis], self.index.array[layer], *keys[axis + 1 :])
        return self._cast(ordered[chosen])

    def __jax_array__(self):
        raise TransformError(_PLAIN)

    def opened(self) -> "Base | jax.Array":
        return self if self.index.axes else self.dense()

    def merged(self) -> jax.Array:
        return self.dense()

    def looks_up(self, axis: int) -> bool:
        return not self.index.holds(axis)

    def cast(self, dtype: Any) -> "Replicated":
        return dataclasses.replace(self, casts=(*self.casts, jnp.dtype(dtype).name))

    def squares(self, axes) -> jax.Array:
        if any(self.index.holds(axis) for axis in axes):
            return super().squares(axes)
        stack = self._cast(self.stack.array).astype(jnp.float32)
        at = tuple(self.stack.axes.index(axis) for axis in axes)
        sums = jnp.square(stack).sum(at, keepdims=True)
        chosen = _choose(Factor(sums, self.stack.axes), self.index)
        return chosen.aligned(tuple(range(len(chosen.axes))))

    def overwritten(self, axis, at, values) -> "Replicated":
        if self.index.axes != (axis,):
            raise Unstructured("some of them are written over once they are chosen")
        stack = self._cast(self.stack.aligned((*range(axis), LAYER, *self._rest(axis))))
        known = stack.shape[axis]
        whole = jnp.concatenate([stack, values.astype(stack.dtype)], axis)
        new = known + jnp.arange(at.shape[0], dtype=self.index.array.dtype)
        index = Factor(self.index.array.at[at].set(new), (axis,))
        return Replicated(
            Factor(whole, (*range(axis), LAYER, *self._rest(axis))), index
        )

    def consume(self, x: jax.Array, op: Bilinear) -> jax.Array:
        """`op(x, W)`; a product with all layers at once runs them one by one."""
        if self.index.array.size == 1:
            return self._consume_one(x, op)
        layer = self._layers()
        if layer is not None and isinstance(op, Dot) and op.out_sharding is None:
            if op.roles.get(layer) != "in":
                return self._consume_each(x, op, layer)
        raise Unstructured(
            f"it needs all {self.index.array.size} of a stack's replicated layers at "
            "once, and they are kept as an index into the stack"
        )

    def _consume_one(self, x: jax.Array, op: Bilinear) -> jax.Array:
        # What is kept for the backward pass is the whole stack, which is there anyway,
        # and the index. The layer itself, kept in every step of a scan, would be the
        # replicated stack.
        def product(x: jax.Array, view: Replicated) -> jax.Array:
            return op.dense(x, view.dense())

        return jax.checkpoint(product, prevent_cse=False)(x, self)

    def _consume_each(self, x: jax.Array, op: Dot, layer: int) -> jax.Array:
        shared = [i for i, axis in op.batch if axis == layer]  # x has a row for each
        before = shared[0] if shared else op.x_ndim

        def without(pairs):
            return tuple(
                (i - (i > before), axis - (axis > layer))
                for i, axis in pairs
                if axis != layer
            )

        one = dataclasses.replace(
            op,
            contract=without(op.contract),
            batch=without(op.batch),
            x_ndim=op.x_ndim - len(shared),
            weight_ndim=op.weight_ndim - 1,
        )
        axes = tuple(
            axis - (axis > layer) if isinstance(axis, int) else axis
            for axis in self.stack.axes
        )

        def step(operands: Any) -> jax.Array:
            index, row = operands
            stack = Factor(self.stack.array, axes)
            view = Replicated(stack, Factor(index, ()), self.casts)
            return view.consume(x if row is None else row, one)

        rows = jnp.moveaxis(x, shared[0], 0) if shared else None
        found = lax.map(step, (self.index.array, rows))
        return jnp.moveaxis(found, 0, op.out_labels.index(layer))

    def apply(self, op: AxisOp) -> "Replicated":
        match op:
            case Cast(dtype):
                return self.cast(dtype)
            case Scale():
                return self.rescale(op)
            case Broadcast():
                raise Unstructured("replicated layers get a new axis")
            case Along(axis, fills=True) if self.index.holds(axis):
                raise Unstructured("replicated layers are padded with others")
            case Pick(axes, fills=True) if any(map(self.index.holds, axes)):
                raise Unstructured("replicated layers are filled in")
        if not self.index.axes and not self._waits(op):
            raise Unstructured("it moves the values of one replicated layer")
        stack, index = self.stack.apply(op), self.index.apply(op)
        return dataclasses.replace(self, stack=stack, index=index)

    def _waits(self, op: AxisOp) -> bool:
        """Whether an operation on one layer can be done to the stack for nothing."""
        if isinstance(op, Transpose):
            return True
        axes = self.stack.axes
        return isinstance(op, Reshape) and axes == (LAYER, *range(len(axes) - 1))

    def rescale(self, op: Scale) -> "Replicated":
        if not self.index.axes:
            raise Unstructured("it moves the values of one replicated layer")
        if any(self.index.holds(axis) for axis in op.axes):
            raise Unstructured("each of the replicated layers is scaled by its own")
        stack = self._cast(self.stack.array)
        values = Factor(op.values, op.axes).aligned(self.stack.axes)
        return Replicated(Factor(op.map(stack, values), self.stack.axes), self.index)

    def _cast(self, array: jax.Array) -> jax.Array:
        for dtype in self.casts:
            array = array.astype(dtype)
        return array

    def _layers(self) -> int | None:
        """The weight's axis of layers, as long as it has one."""
        axes = self.index.axes
        return axes[0] if len(axes) == 1 and isinstance(axes[0], int) else None

    def _rest(self, axis: int) -> range:
        """The weight's axes behind that of layers."""
        return range(axis + 1, len(self.shape))


def _last(item: tuple[Any, int]) -> tuple[bool, Any]:
    return isinstance(item[0], str), item[0]


def _choose(stack: Factor, index: Factor) -> Factor:
    """The layers that an index names, along the axes of both."""
    shared = [axis for axis in index.axes if stack.holds(axis)]
    if shared:  # a layer and an expert, chosen together
        axis = shared[0]
        at = stack.axes.index(axis), index.axes.index(axis)
        less = [tuple(x for x in f.axes if x != axis) for f in (stack, index)]

        def one(layers: jax.Array, names: jax.Array) -> Factor:
            return _choose(Factor(layers, less[0]), Factor(names, less[1]))

        found = jax.vmap(one, at)(stack.array, index.array)
        return Factor(found.array, (axis, *found.axes))
    at = stack.axes.index(LAYER)
    rest = stack.axes[:at], stack.axes[at + 1 :]
    if not index.axes:
        array = lax.dynamic_index_in_dim(stack.array, index.array, at, keepdims=False)
        return Factor(array, (*rest[0], *rest[1]))
    array = jnp.take(stack.array, index.array, axis=at, mode="clip")
    return Factor(array, (*rest[0], *index.axes, *rest[1]))
