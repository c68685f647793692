"""Truncated decompositions, made of matrix products."""

from ._eigh import RELATIVE as RELATIVE
from ._eigh import eigh_top as eigh_top
from ._filter import TOLERANCE as TOLERANCE
from ._signs import signs as signs
from ._svd import ACCEPTED as ACCEPTED
from ._svd import Svd as Svd
from ._svd import residual as residual
from ._svd import svd_top as svd_top
from ._svd_random import random_error as random_error
from ._svd_random import svd_random as svd_random
