"""Where an adapter starts: one method a file."""

from ._base import Initializer as Initializer
from ._base import Method as Method
from ._base import Start as Start
from ._base import families as families
from ._base import family as family
from ._base import get as get
from ._base import method as method
from ._base import names as names
from ._base import register as register
from ._embedding import embedding as embedding
from ._gaussian import gaussian as gaussian
from ._kaiming import kaiming as kaiming
from ._mica import mica as mica
from ._olora import olora as olora
from ._orthogonal import orthogonal as orthogonal
from ._pissa import pissa as pissa
from ._pissa import pissa_niter as pissa_niter
from ._random import random as random
