"""Which weights to adapt, at which rank, by what their matrices look like."""

from ._allocate import allocate as allocate
from ._greedy import greedy as greedy
from ._kappa import Kappa as Kappa
from ._kappa import kappa as kappa
from ._plot import plot_spectra as plot_spectra
from ._spectra import spectra as spectra
