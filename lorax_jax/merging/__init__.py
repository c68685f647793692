"""Writing adapters into weights."""

from ._merge import MergeReport as MergeReport
from ._merge import merge as merge
