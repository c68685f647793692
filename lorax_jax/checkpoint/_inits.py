"""Names and options of initializers in our metadata."""

import dataclasses
from typing import Any

from .. import initializers
from .._errors import LoraxError
from ._fields import Fields

_MOST = 64


def encode_init(init: Any) -> Any:
    """An initializer as JSON: its name, or the name of its options and their values.

    >>> encode_init("pissa"), encode_init(None)
    ('pissa', None)
    """
    if not dataclasses.is_dataclass(init) or isinstance(init, type):
        return init
    return {"class": type(init).__name__, **dataclasses.asdict(init)}


def decode_init(read: Fields) -> Any:
    """What `encode_init` wrote, of a site that anybody may have written.

    Names that are not known here are kept: they say how training started, and change
    nothing of what the factors compute.

    Raises:
        CheckpointError: if it is neither a short name nor options that are known here.
    """
    said = read.fields.get("init")
    if said is None or (isinstance(said, str) and 0 < len(said) <= _MOST):
        return said
    if not isinstance(said, dict) or len(said) > _MOST:
        raise read.bad("`init`", said)
    kind = vars(initializers).get(str(said.get("class")))
    plain = all(isinstance(v, str | int | float | bool | None) for v in said.values())
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind) or not plain:
        raise read.bad("`init`", said)
    try:
        found = kind(**{str(n): v for n, v in said.items() if n != "class"})
        initializers.method(found)
    except (TypeError, ValueError, KeyError, LoraxError):
        raise read.bad("`init`", said) from None
    return found
