"""`lay_out`: values for each token, in the order of an array that was followed."""

import math
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import FollowError
from ._stretches import Axis, Lost, Stretch


def lay_out(
    values: jax.Array,
    axes: Sequence[Axis],
    shape: Sequence[int],
    *,
    labels: Sequence[Hashable] | None = None,
    padding: float | int | bool = 0,
) -> jax.Array:
    """Puts `values`, one entry for each token, in the order of another array.

    For axes that `follow` gave: transposed, merged, split, cut and reversed as the
    array was, and repeated along axes that no followed axis runs along.

    Args:
        values: a mask, weights or row ids, one axis for each followed axis.
        axes: what runs along each axis of the other array, as `Followed.axes` gives.
        shape: the sizes of these axes.
        labels: which followed axis each axis of `values` is; by default 0, 1, ...
        padding: the value of entries that the model added as padding.

    Returns:
        An array of that shape, with the dtype of `values`.

    Raises:
        FollowError: if an axis of `values` is not found exactly once among `axes`
            (one of size 1 need not be), or the order of an axis is lost.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax_jax.transform import follow
        >>> ids = jnp.zeros((2, 3), int)
        >>> jaxpr = jax.make_jaxpr(lambda ids: ids.T.reshape(6))(ids)
        >>> [axes] = follow(jaxpr, {0: (0, 1)}).results
        >>> lay_out(jnp.array([[1, 2, 3], [4, 5, 6]]), axes, (6,)).tolist()
        [1, 4, 2, 5, 3, 6]
    """
    labels = tuple(range(values.ndim)) if labels is None else tuple(labels)
    if len(labels) != values.ndim:
        raise FollowError(
            f"`lay_out` got {len(labels)} `labels` for values of shape {values.shape}. "
            "Give one for each axis."
        )
    parts: dict[Hashable, list[Stretch]] = {label: [] for label in labels}
    expanded: list[tuple[Hashable, int]] = []  # every stretch, in the array's order
    for axis, size in zip(axes, shape, strict=True):
        if isinstance(axis, Lost):
            raise FollowError(f"{axis.reason}\n  at  {axis.source}")
        found = math.prod(stretch.size for stretch in axis)
        if axis and found != size:
            raise FollowError(
                f"`shape` = {tuple(shape)} is not that of the axes that were "
                f"followed: {found} entries run along one of {size}."
            )
        for stretch in axis or (Stretch(None, size),):
            if stretch.label is not None and stretch.label not in parts:
                raise FollowError(
                    f"the array's axes run along {stretch.label!r}, and the values "
                    f"of shape {values.shape} have no such axis among {labels}."
                )
            parts.get(stretch.label, []).append(stretch)
            expanded.append((stretch.label, stretch.size))
    # Each axis of the values, in the order of the stretches along it and split as they.
    split: list[int] = []
    place: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        sizes = [stretch.size for stretch in parts[label]]
        values = _take(values, i, label, parts[label], padding)
        place[label] = list(range(len(split), len(split) + len(sizes)))
        split += sizes
    order = [place[label].pop(0) for label, _ in expanded if label is not None]
    values = values.reshape(split).transpose(order)
    thin = [1 if label is None else size for label, size in expanded]
    full = [size for _, size in expanded]
    return jnp.broadcast_to(values.reshape(thin), full).reshape(tuple(shape))


def _take(values, axis: int, label, parts: list[Stretch], padding) -> jax.Array:
    """One axis of the values, entry by entry of the stretches along it."""
    size = values.shape[axis]
    if not parts:
        if size == 1:
            return values
        raise FollowError(
            f"no axis of the array runs along axis {label!r}, which has {size} "
            "entries: they were summed over, picked one by one, or never entered it."
        )
    positions = np.zeros((), int)
    for part in parts:
        run = part.start + part.step * np.arange(part.size)
        positions = positions[..., None] + run
    positions = positions.ravel()
    steps = np.diff(np.sort(positions))
    if (
        positions.size != parts[0].whole
        or not (steps == steps[0]).all()
        or not steps[0]
    ):
        raise FollowError(
            f"axis {label!r} runs along the array in pieces of sizes "
            f"{[part.size for part in parts]}, which are not all of it once: it stands "
            "there twice, or a part of it was summed over or picked."
        )
    if size != parts[0].extent:
        raise FollowError(
            f"the values have {size} entries along axis {label!r}, which has "
            f"{parts[0].extent} where it was followed from."
        )
    if np.array_equal(positions, np.arange(size)):
        return values
    inside = (positions >= 0) & (positions < size)
    taken = jnp.take(values, np.where(inside, positions, 0), axis=axis)
    if inside.all():
        return taken
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    keep = jnp.asarray(inside).reshape(shape)
    return jnp.where(keep, taken, jnp.asarray(padding, values.dtype))
