"""Frozen bases in other forms than dense arrays."""

from ._base import Base as Base
