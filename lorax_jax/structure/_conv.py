"""`Conv`: convolutions, in every layout of `conv_general_dilated`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ._axes import GROUP, RANK, Label, Unstructured
from ._bilinear import AxisRole, Bilinear, down_and_up
from ._factor import Factor
from ._groups import MEMBER, apart, together
from ._products import OperandLabel, arrange, product, product_labels
from ._rows import Rows


@dataclasses.dataclass(frozen=True)
class Conv(Bilinear):
    r"""A convolution of an image `x` with a kernel, of any rank and layout.

    A low-rank change of the kernel is a convolution with few outputs, then a product
    over channels at every point:

    $$x * (A B) = (x * A)\,B .$$

    A has the kernel's window and is moved over `x` as the kernel is, with its strides,
    padding and dilations. In a grouped convolution every group has an A and a B of its
    own; see `_groups`.

    Attributes:
        numbers: positions of (batch, channel, *window) in `x` and in the result, and of
            (outputs, inputs, *window) in the kernel.
        shape: the kernel's shape.
        strides, padding, lhs_dilation, rhs_dilation: as in
            `jax.lax.conv_general_dilated`.
        groups: its `feature_group_count`.
        precision: as there, for (image, kernel).
        output_dtype: `preferred_element_type` of the dense convolution.
        out_sharding: of the dense convolution, where the model declared one.
    """

    numbers: lax.ConvDimensionNumbers
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int = 1
    precision: Any = None
    output_dtype: Any = None
    out_sharding: Any = None

    @property
    def out_axis(self) -> int:
        """The kernel's axis of outputs."""
        return self.numbers.rhs_spec[0]

    @property
    def in_axis(self) -> int:
        """The kernel's axis of inputs: of one group's, if there are groups."""
        return self.numbers.rhs_spec[1]

    @property
    def window(self) -> tuple[int, ...]:
        """The kernel's other axes, which move over `x`."""
        return tuple(self.numbers.rhs_spec[2:])

    @property
    def x_labels(self) -> tuple[OperandLabel, ...]:
        channel = self.numbers.lhs_spec[1]
        labels: list[OperandLabel] = [("x", i) for i in range(len(self.shape))]
        if self.groups == 1:  # else `x` has the channels of all groups side by side
            labels[channel] = self.in_axis
        return tuple(labels)

    @property
    def out_labels(self) -> tuple[OperandLabel, ...]:
        return self._labels(self.out_axis)

    def _labels(self, *channel: OperandLabel) -> tuple[OperandLabel, ...]:
        """Labels of a result whose channel has these labels.

        A point of the result is none of `x`: `x` may be padded, and strides skip.
        """
        batch, at, *points = self.numbers.out_spec
        labels: dict[int, tuple[OperandLabel, ...]] = {at: channel}
        labels[batch] = (("x", self.numbers.lhs_spec[0]),)
        labels |= {position: (("point", i),) for i, position in enumerate(points)}
        return tuple(label for i in sorted(labels) for label in labels[i])

    @property
    def roles(self) -> dict[int, AxisRole]:
        return dict.fromkeys((self.in_axis, *self.window), "in")

    def dense(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        return self._run(
            x,
            weight,
            self.numbers,
            preferred_element_type=self.output_dtype,
            out_sharding=self.out_sharding,
        )

    def as_rows(self, x: jax.Array) -> Rows:
        """The patches of `x` that the window covers, point by point."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.float32)
        inputs = (*self.window, self.in_axis)
        sizes = tuple(self.shape[axis] for axis in inputs)
        d_in = math.prod(sizes)
        # Each output of this convolution is one entry of the patch.
        kernel = jnp.eye(d_in, dtype=x.dtype).reshape(*sizes, 1, d_in)
        kernel = jnp.broadcast_to(kernel, (*sizes, self.groups, d_in))
        exact = dataclasses.replace(self, precision=lax.Precision.HIGHEST)
        patches = exact._convolve(x, kernel.reshape(*sizes, -1))
        at = self.numbers.out_spec[1]
        before, behind = patches.shape[:at], patches.shape[at + 1 :]
        array = patches.reshape(*before, self.groups, *sizes, *behind)
        return Rows(array, self._labels(GROUP, *inputs), plain=False)

    def low_rank(self, x: jax.Array, a: Factor, b: Factor, like: Any) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(like.dtype)  # integers times a floating kernel
        first, second = down_and_up(
            a.astype(x.dtype), b.astype(x.dtype), {self.in_axis}
        )
        if first.holds(self.out_axis):
            raise Unstructured("one factor runs along inputs and outputs of a kernel")
        if not any(second.holds(axis) for axis in self.window):
            return self._window_first(x, first, second, like)
        if any(first.holds(axis) for axis in self.window):
            raise Unstructured("both factors run along the window of a kernel")
        if self.groups > 1:
            raise Unstructured("A and B of a grouped kernel have changed places")
        return self._window_last(x, first, second, like)

    def _window_first(
        self, x: jax.Array, first: Factor, second: Factor, like: Any
    ) -> jax.Array:
        """A convolution with the first factor, then a product with the second."""
        at = self.numbers.out_spec[1]
        channel: tuple[OperandLabel, ...] = (self.out_axis,)
        shape, down = like.shape, (RANK,)
        if self.groups > 1:
            down = (GROUP, RANK)
            channel = (GROUP, MEMBER)
            shape = (
                *shape[:at],
                self.groups,
                shape[at] // self.groups,
                *shape[at + 1 :],
            )
            if second.holds(self.out_axis):
                second = apart(second, (self.out_axis,), self.groups)
        with jax.named_scope("lora_down"):
            kernel = self._kernel(first, (self.in_axis,), down)
            t = self._convolve(
                x, kernel, out_sharding=self._place(self._labels("channel"))
            )
            if self.groups > 1:
                t = t.reshape(*t.shape[:at], self.groups, -1, *t.shape[at + 1 :])
        with jax.named_scope("lora_up"):
            wanted, labels = self._labels(*channel), self._labels(*down)
            made = product_labels(labels, second.axes, set(wanted))
            t, labels = product(
                t,
                labels,
                second.array,
                second.axes,
                keep=set(wanted),
                precision=self.precision,
                output_dtype=self.output_dtype,
                out_sharding=self._place(made),
            )
            t = arrange(t, labels, wanted, shape)
            if self.groups > 1:
                t = together(t, at, like.shape[at])
                if self.out_sharding is not None:
                    t = jax.sharding.reshard(t, self.out_sharding)
            return t.astype(like.dtype)

    def _window_last(
        self, x: jax.Array, first: Factor, second: Factor, like: Any
    ) -> jax.Array:
        """A product with the first factor, then a convolution with the second.

        This is what a kernel with inputs and outputs exchanged needs.
        """
        batch, at, *points = self.numbers.lhs_spec
        here: dict[int, OperandLabel] = {i: ("x", i) for i in (batch, *points)}
        labels = tuple((here | {at: self.in_axis})[i] for i in range(x.ndim))
        wanted = tuple((here | {at: RANK})[i] for i in range(x.ndim))
        rank = second.array.shape[second.axes.index(RANK)]
        with jax.named_scope("lora_down"):
            made = product_labels(labels, first.axes, set(wanted))
            t, t_labels = product(
                x,
                labels,
                first.array,
                first.axes,
                keep=set(wanted),
                precision=self.precision,
                out_sharding=self._place(made, x, labels),
            )
            shape = tuple(rank if i == at else n for i, n in enumerate(x.shape))
            t = arrange(t, t_labels, wanted, shape)
        with jax.named_scope("lora_up"):
            kernel = self._kernel(second, (RANK,), (self.out_axis,))
            t = self._convolve(
                t,
                kernel,
                preferred_element_type=self.output_dtype,
                out_sharding=self.out_sharding,
            )
            return t.astype(like.dtype)

    def _place(
        self,
        labels: tuple[OperandLabel, ...],
        x: jax.Array | None = None,
        x_labels: tuple[OperandLabel, ...] = (),
    ) -> Any:
        """How a thin result is laid out, where the model declares it for the dense one.

        Each axis is where the dense result, or `x`, has it; the rank is replicated.
        """
        if self.out_sharding is None:
            return None
        mesh, spec = None, self.out_sharding
        if isinstance(spec, NamedSharding):
            mesh, spec = spec.mesh, spec.spec
        where = dict(zip(self.out_labels, spec, strict=False))
        if x is not None:
            where |= dict(zip(x_labels, jax.typeof(x).sharding.spec, strict=True))
        out = PartitionSpec(*(where.get(label) for label in labels))
        return out if mesh is None else NamedSharding(mesh, out)

    def _kernel(
        self, factor: Factor, inputs: tuple[Label, ...], outputs: tuple[Label, ...]
    ) -> jax.Array:
        """A factor as a kernel: axes (*window, inputs, outputs)."""
        sizes: dict[Label, int] = dict(enumerate(self.shape))
        sizes[GROUP] = self.groups
        kernel = factor.filled((*self.window, *inputs, *outputs), sizes)
        return kernel.reshape(*kernel.shape[: len(self.shape) - 1], -1)

    def _convolve(self, x: jax.Array, kernel: jax.Array, **kwargs: Any) -> jax.Array:
        """The convolution with another kernel, axes (*window, inputs, outputs)."""
        last = len(self.shape) - 1
        spec = (last, last - 1, *range(last - 1))
        return self._run(x, kernel, self.numbers._replace(rhs_spec=spec), **kwargs)

    def _run(
        self, x: jax.Array, kernel: jax.Array, numbers: Any, **kwargs: Any
    ) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            self.strides,
            self.padding,
            self.lhs_dilation,
            self.rhs_dilation,
            numbers,
            feature_group_count=self.groups,
            precision=self.precision,
            **kwargs,
        )
