"""Writing adapters into weights."""

from ._merge import MergeReport as MergeReport
from ._merge import merge as merge
from ._merge import merged_weight as merged_weight
