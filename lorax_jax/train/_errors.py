"""What can go wrong between a data file and a trained adapter."""

from .._errors import LoraxError


class DataError(LoraxError, ValueError):
    """A data file does not hold what training needs."""


class TrainingError(LoraxError, RuntimeError):
    """Training cannot start, or cannot go on."""
