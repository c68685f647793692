"""How a vocabulary grew, as our metadata tells it."""

from typing import Any, NamedTuple

from .._errors import GrowthError
from .._growth import INITS, Growth, Table
from ._fields import Fields
from ._file_site import MOST_ROWS

_MOST_AXES = 16


class FileTensor(NamedTuple):
    """A table of tokens in a checkpoint.

    Attributes:
        name: the tensor's name.
        turned: whether it is the transpose of our leaf.
    """

    name: str
    turned: bool


class FileGrowth(NamedTuple):
    """How the vocabulary grew that an adapter was trained on.

    Attributes:
        growth: what grew, and how.
        tensors: its tables in the checkpoint, `None` where not known.
    """

    growth: Growth
    tensors: tuple[FileTensor | None, ...]

    def encode(self) -> dict[str, Any]:
        """As JSON."""
        growth = self.growth
        tables = [
            table._asdict() | ({} if tensor is None else tensor._asdict())
            for table, tensor in zip(growth.tables, self.tensors, strict=True)
        ]
        numbers = {n: getattr(growth, n) for n in ("before", "to", "multiple", "seed")}
        return {"tables": tables, **numbers, "init": growth.init}


def read_file_growth(grown: Any, what: str) -> FileGrowth | None:
    """What `FileGrowth.encode` wrote, if anything.

    Raises:
        CheckpointError: if it is not what `encode` writes.
    """
    if grown is None:
        return None
    read = Fields(grown, f"The metadata of {what}")
    tables, tensors = [], []
    for fields in read("tables", list):
        table = Fields(fields, read.what)
        tables.append(Table(*(table(n, k) for n, k in Table.__annotations__.items())))
        name = table("name", str, optional=True)
        turned = name is not None and table("turned", bool)
        tensors.append(None if name is None else FileTensor(name, turned))
    numbers = {n: read(n, int) for n in ("before", "to", "multiple", "seed")}
    init = read("init", str, INITS)
    try:
        growth = Growth(tuple(tables), init=init, **numbers)
    except GrowthError:
        raise read.bad("`grown`", numbers) from None
    inside = all(0 <= t.axis < t.ndim <= _MOST_AXES for t in tables)
    inside &= all(
        t.ndim == 2 for t, n in zip(tables, tensors, strict=True) if n and n[1]
    )
    # What a file asks for is allocated when it is loaded.
    if not tables or not inside or growth.after - growth.before > MOST_ROWS:
        raise read.bad("`grown`", grown)
    return FileGrowth(growth, tuple(tensors))
