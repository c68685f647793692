"""Reading JSON that anybody may have written, field by field."""

from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import CheckpointError


class Fields:
    """Reads typed fields of an object."""

    def __init__(self, fields: Any, what: str):
        self.fields = fields if isinstance(fields, Mapping) else {}
        self.what = what

    def __call__(
        self,
        name: str,
        kind: type,
        among: Sequence[Any] | None = None,
        *,
        optional: bool = False,
    ) -> Any:
        value = self.fields.get(name)
        if value is None and optional:
            return None
        kinds = (int, float) if kind is float else (kind,)
        wrong = isinstance(value, bool) and kind is not bool
        if not isinstance(value, kinds) or wrong or (among and value not in among):
            raise self.bad(f"`{name}`", value)
        if isinstance(value, int | float) and not abs(value) < 1e30:
            raise self.bad(f"`{name}`", value)
        return value

    def sizes(self, name: str, most: int = 16) -> tuple[int, ...]:
        """A list of small integers, a short one."""
        values = self(name, list)
        for n in values:
            if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 1 << 48:
                raise self.bad(f"`{name}`", values)
        if len(values) > most:
            raise self.bad(f"`{name}`", values)
        return tuple(values)

    def bad(self, label: str, value: Any) -> CheckpointError:
        return CheckpointError(
            f"{self.what} has {label} = {value!r:.80}, which `save_adapter` never "
            "writes: the file was changed or damaged. If PEFT's keys and "
            "adapter_config.json are right, remove the metadata and give `names`."
        )
