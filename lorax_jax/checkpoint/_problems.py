"""What a file and the parameters disagree about, as it is found."""

import dataclasses
from pathlib import Path

from .._errors import CheckpointError
from ._files import TENSORS
from ._keys import explain
from ._receipt import lines


@dataclasses.dataclass
class Problems:
    """Lists that grow while an adapter is loaded; see `Receipt` for what they hold.

    Attributes:
        left: keys that no site has claimed.
    """

    left: dict[str, None]
    missing: list[str] = dataclasses.field(default_factory=list)
    misshapen: list[str] = dataclasses.field(default_factory=list)
    nonfinite: list[str] = dataclasses.field(default_factory=list)
    changed: list[str] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)

    @property
    def count(self) -> int:
        """How many problems sites have with the shapes of their tensors."""
        return len(self.missing) + len(self.misshapen) + len(self.changed)

    def lines(self) -> tuple[str, ...]:
        """Every problem in a line of its own."""
        return lines(
            missing=self.missing,
            unexpected=list(map(explain, self.left)),
            misshapen=self.misshapen,
            nonfinite=self.nonfinite,
            changed=self.changed,
        )

    def check(self, folder: Path) -> None:
        """Raises if there are any.

        Raises:
            CheckpointError: with the first of them.
        """
        problems = self.lines()
        if not problems:
            return
        shown = "\n".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(
            f"{folder / TENSORS} does not fit the parameters:\n"
            f"{shown}{more}\n"
            "Nothing was loaded. `strict=False` loads what fits and lists the rest."
        )
