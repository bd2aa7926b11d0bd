"""Value-gap bounds, exact tabular chunk MDPs and compounding-error studies. See README.md."""

from experiments.theory.bounds import (
    Coefficients,
    branched,
    corrected_branched,
    corrected_full_horizon,
    full_horizon,
    saturating_branched,
)
from experiments.theory.branch_length import branch_length_curve, optimal_branch_length

__all__ = [
    "Coefficients",
    "branch_length_curve",
    "branched",
    "corrected_branched",
    "corrected_full_horizon",
    "full_horizon",
    "optimal_branch_length",
    "saturating_branched",
]
