"""Running a model to gather what initializers read."""

from ._gradient import GradientCapture as GradientCapture
from ._gradient import capture_grad as capture_grad
from ._gradient_state import GradientState as GradientState
