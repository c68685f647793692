"""What is kept of the rows that reach a weight: one statistic a file."""

from ._base import Principal as Principal
from ._base import Statistic as Statistic
from ._gradient_factors import GradientFactors as GradientFactors
from ._moments import Moments as Moments
from ._moments import MomentsState as MomentsState
from ._pca import Pca as Pca
from ._pca import PcaState as PcaState
from ._second_moment import SecondMoment as SecondMoment
from ._second_moment import SecondMomentState as SecondMomentState
from ._sketch import Sketch as Sketch
from ._sketch import SketchState as SketchState
