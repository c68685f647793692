"""Layers that are used several times and kept once."""

from ._check import layers_of as layers_of
from ._check import shared_layers as shared_layers
from ._replicate import replicate as replicate
from ._view import Replicated as Replicated
