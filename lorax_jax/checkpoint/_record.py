"""What a file says about its sites: our own metadata in the safetensors header.

PEFT's configuration has no word for the axes of a weight or for one use of a tied
weight. The metadata has, so that our files load without a plan, a name table or the
configuration beside them. It is written in terms of single layers: a stacked model and
an unrolled one write the same file.
"""

import dataclasses
import json
from typing import Any, Literal

from .._errors import CheckpointError, ConfigError
from .._ranges import Ranges, checked_ranges
from ._fields import Fields
from ._file_growth import FileGrowth, read_file_growth
from ._file_site import FileSite, read_site

# The metadata's name in the header, and its version: 1 where all is plain LoRA, which
# releases that know of nothing else read too; 3 where factors are frozen or a start is
# kept, which those that do not know of it would take for something else.
FIELD = "lorax_jax"
VERSION = 3

Keys = Literal["peft", "paths"]
BIASES = ("none", "all", "lora_only")


@dataclasses.dataclass(frozen=True)
class Record:
    """The metadata of a file.

    Attributes:
        keys: `"peft"` if keys are PEFT's, `"paths"` if they are our paths.
        rslora: whether scales are `alpha / sqrt(rank)`.
        sites: what the file holds.
        bias: which biases the configuration asked for.
        layer_replication: the ranges of layers that the model is made of.
        grown: how the vocabulary grew, if it did.
    """

    keys: Keys
    rslora: bool
    sites: tuple[FileSite, ...]
    bias: str = "none"
    layer_replication: Ranges | None = None
    grown: FileGrowth | None = None

    def encode(self) -> dict[str, str]:
        """The header's metadata."""
        plain = self.layer_replication is None and self.grown is None
        plain &= all(site.is_plain for site in self.sites)
        newer = any(site.start or site.frozen for site in self.sites)
        whole: dict[str, Any] = {
            "version": 3 if newer else 1 if plain else 2,
            "keys": self.keys,
            "rslora": self.rslora,
            "sites": [site.encode() for site in self.sites],
        }
        if self.bias != "none":
            whole["bias"] = self.bias
        if self.layer_replication is not None:
            whole["layer_replication"] = self.layer_replication
        if self.grown is not None:
            whole["grown"] = self.grown.encode()
        return {"format": "pt", FIELD: json.dumps(whole, separators=(",", ":"))}


def decode(text: Any, what: str) -> Record:
    """Reads a file's metadata, which anybody may have written.

    Args:
        text: the parsed JSON.
        what: the file, for messages.

    Raises:
        CheckpointError: if it is not what `encode` writes.
    """
    read = Fields(text, f"The metadata of {what}")
    version = read("version", int)
    if version not in range(1, VERSION + 1):
        raise CheckpointError(
            f"{what} has metadata of version {version}; this release reads versions up "
            f"to {VERSION}. Load it with the release of lorax-jax that wrote it."
        )
    sites = tuple(read_site(site, what) for site in read("sites", list))
    both = [
        (*site.keys().values(), *site.tied_keys().values())
        for site in sites
        if site.ranks is None or not site.ranks[0]  # the first part speaks for all
    ]
    for label, seen in (
        ("sites", [site.name for site in sites]),
        ("keys", [key for one in both for key in one]),
    ):
        if len(set(seen)) < len(seen):
            raise read.bad(f"`{label}`, some of them twice,", sorted(map(str, seen)))
    layout = "joined" if read("keys", str, ("peft", "paths")) == "peft" else "apart"
    for site in sites:
        kept = [site.start, *site.frozen]
        if site.start not in (None, layout) or (version < 3 and any(kept)):
            raise read.bad("starting or frozen factors", kept)
    return Record(
        keys=read("keys", str, ("peft", "paths")),
        rslora=read("rslora", bool),
        sites=sites,
        bias=read("bias", str, BIASES, optional=True) or "none",
        layer_replication=_ranges(read),
        grown=read_file_growth(read("grown", dict, optional=True), what),
    )


def _ranges(read: Fields) -> Ranges | None:
    ranges = read("layer_replication", list, optional=True)
    try:
        return None if ranges is None else checked_ranges(ranges, "`layer_replication`")
    except ConfigError:
        raise read.bad("`layer_replication`", ranges) from None
