"""Statistics of what reaches each adapted weight, gathered while a model runs."""

from ._capture import Capture as Capture
from ._capture import capture as capture
from ._stats import Stats as Stats
