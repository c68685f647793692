"""How pieces of a weight follow what a model does to the weight."""

from ._axes import RANK as RANK
from ._axes import Along as Along
from ._axes import AxisOp as AxisOp
from ._axes import Broadcast as Broadcast
from ._axes import Cast as Cast
from ._axes import Group as Group
from ._axes import Label as Label
from ._axes import Pick as Pick
from ._axes import Place as Place
from ._axes import Reshape as Reshape
from ._axes import Scale as Scale
from ._axes import Transpose as Transpose
from ._axes import Unstructured as Unstructured
from ._axes import reshape as reshape
from ._bilinear import AxisRole as AxisRole
from ._bilinear import Bilinear as Bilinear
from ._bilinear import Use as Use
from ._dot import Dot as Dot
from ._factor import Factor as Factor
from ._factor import is_factor as is_factor
from ._products import OperandLabel as OperandLabel
from ._products import arrange as arrange
from ._products import cost as cost
from ._products import product as product
from ._products import wide as wide
from ._take import Take as Take
