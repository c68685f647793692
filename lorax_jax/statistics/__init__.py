"""What is gathered of each site, as arrays: statistics that add up."""

from ._gradient_factors import GradientFactors as GradientFactors
