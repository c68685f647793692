"""Batches as calls of a model, with the masks that go with them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .._errors import CaptureError
from ._run import Call, arguments


class Calls:
    """Batches as arguments, which can be gone through again.

    Args:
        source: batches, or a function that gives an iterator of them. Each is a tuple
            of the model's arguments, a mapping of its keyword arguments, or its only
            argument.
        mask: gives the mask of a batch from its arguments; `None` leaves it at what
            batches call `mask`.

    Raises:
        CaptureError: if the source is neither.

    Example:
        >>> list(Calls([3, (4, 5)]))
        [Call(args=(3,), kwargs={}), Call(args=(4, 5), kwargs={})]
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[], Iterable[Any]],
        mask: Callable[..., Any] | None = None,
    ):
        if not (callable(source) or isinstance(source, Iterable)):
            raise CaptureError(
                f"`batches` is a {type(source).__name__}; a list of batches is meant, "
                "or a function that gives an iterator of them."
            )
        if mask is not None and not callable(mask):
            raise CaptureError(
                f"`mask` is a {type(mask).__name__}; a function of a batch's arguments "
                "is meant, which gives its mask: `mask=lambda ids, weights: weights`."
            )
        self.source, self.mask = source, mask

    def __iter__(self) -> Iterator[Call]:
        for batch in self.source() if callable(self.source) else self.source:
            args, kwargs = arguments(batch)
            if self.mask is not None:
                kwargs = kwargs | {"mask": self.mask(*args, **kwargs)}
            yield Call(args, kwargs)

    def __len__(self) -> int:
        """How many there are; 0 where nobody knows."""
        return len(self.source) if hasattr(self.source, "__len__") else 0  # type: ignore
