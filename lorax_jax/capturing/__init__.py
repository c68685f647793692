"""Running a model to gather what initializers read."""

from ._capture import Capture as Capture
from ._capture import capture as capture
from ._eva import eva as eva
from ._gathered import Gathered as Gathered
from ._gradient import GradientCapture as GradientCapture
from ._gradient import capture_grad as capture_grad
from ._gradient_state import GradientState as GradientState
from ._label_mask import label_mask as label_mask
from ._prepare import Prepared as Prepared
from ._prepare import prepare as prepare
from ._prepare import prepared_types as prepared_types
from ._redistribute import redistribute as redistribute
from ._settle import EvaResult as EvaResult
from ._stats import Stats as Stats
