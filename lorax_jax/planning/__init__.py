"""From a configuration and a model to sites, and from sites to a starting adapter."""

from ._grow import grow as grow
from ._init import init as init
from ._layer_matrices import layer_matrices as layer_matrices
from ._plan import Memory as Memory
from ._plan import Plan as Plan
from ._plan import plan as plan
from ._resize import fitted as fitted
from ._resize import resized as resized
from ._sites import Site as Site
from ._sites import Slot as Slot
from ._sites import parameters as parameters
from ._spectra import Spectra as Spectra
from ._witness import places as places
from ._witness import witness as witness
