"""Running a model to gather what initializers read."""

from ._eva import EvaResult as EvaResult
from ._eva import eva as eva
from ._label_mask import label_mask as label_mask
from ._redistribute import redistribute as redistribute
