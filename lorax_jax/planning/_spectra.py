"""`Spectra`: how a site's energy spreads over directions."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .._errors import PlanError, closest, shorten


@dataclasses.dataclass(frozen=True, eq=False)
class Spectra(Mapping[str, np.ndarray]):
    r"""What each direction of each site is worth, the most valuable first.

    A mapping from the name of a site to $v_1 \ge v_2 \ge \dots \ge 0$: squared singular
    values of its weight, variances of its inputs, or whatever a rank is to capture.

    Attributes:
        energies: name of a site -> the $v_i$, in float64.
        totals: name of a site -> the energy of all directions, those beyond the
            spectrum included.

    Raises:
        PlanError: for a spectrum that has no such order, is empty, or is not finite.

    Example:
        >>> spectra = Spectra.of({"w": [9.0, 4.0, 1.0]})
        >>> spectra.explained("w", 1), spectra.captured({"w": 2})
        (0.6428571428571429, 13.0)
    """

    energies: Mapping[str, np.ndarray]
    totals: Mapping[str, float]

    def __post_init__(self):
        for name, values in self.energies.items():
            if values.ndim != 1 or not values.size:
                raise PlanError(
                    f"The spectrum of {name!r} has the shape {values.shape}; one value "
                    "for each direction is meant, in one axis."
                )
            if not (np.isfinite(values).all() and np.isfinite(self.totals[name])):
                raise PlanError(
                    f"The spectrum of {name!r} is not finite. Look for NaN or infinity "
                    "in the weight or in what reached it."
                )
            if (values < 0).any() or (np.diff(values) > 0).any():
                raise PlanError(
                    f"The spectrum of {name!r} is not a descending one of values from "
                    f"0 up: {values[:4].tolist()}... Give squared singular values or "
                    "variances, the largest first."
                )

    @classmethod
    def of(cls, spectra: Mapping[str, Any]) -> "Spectra":
        """Spectra from plain sequences, each of all energy that there is.

        Raises:
            PlanError: if they are no mapping, or one is no sequence of numbers.
        """
        if isinstance(spectra, Spectra):
            return spectra
        if not isinstance(spectra, Mapping):
            raise PlanError(
                f"`spectra` is a {type(spectra).__name__}; a mapping is meant, from "
                "names of sites to what each direction is worth: `lj.spectra(plan, "
                "params)` gives one."
            )
        energies = {name: _numbers(name, v) for name, v in spectra.items()}
        return cls(energies, {name: float(v.sum()) for name, v in energies.items()})

    def __getitem__(self, name: str) -> np.ndarray:
        return self.energies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.energies)

    def __len__(self) -> int:
        return len(self.energies)

    def explained(self, name: str, rank: int) -> float:
        """The share of a site's energy in its `rank` first directions.

        1 of a site without energy, of which nothing is left to explain.
        """
        total = self.totals[name]
        return min(float(self[name][:rank].sum()) / total, 1.0) if total > 0 else 1.0

    def captured(self, ranks: Mapping[str, int]) -> float:
        """The energy in the first directions of all sites, as many as `ranks` says."""
        return float(sum(self[name][: ranks.get(name, 0)].sum() for name in self))

    def check_names(self, known: Mapping[str, Any]) -> None:
        """Raises unless every spectrum is that of one of these sites."""
        for name in self:
            if name not in known:
                raise PlanError(
                    f"A spectrum is given for {name!r}, which is no site of the plan "
                    f"that has a rank. Closest: {shorten(closest(name, known))}."
                )


def _numbers(name: str, given: Any) -> np.ndarray:
    try:
        return np.asarray(given, np.float64)
    except (TypeError, ValueError):
        raise PlanError(
            f"The spectrum of {name!r} is a {type(given).__name__} and no sequence of "
            "numbers. Of what `capture`, `capture_grad` or `prepare` gathered, "
            "`lj.spectra(plan, stats=stats)` gives the spectra."
        ) from None
