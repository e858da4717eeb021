"""Gradient preconditioning for PyTorch: a curvature matrix, in a representation, inverted by a solver.

direction = (C, damped) ^ (-power) applied to the gradient
"""

from precond import damping, history, layers, likelihoods, matrices, operators, representations, solvers, transforms
from precond.auto import Auto
from precond.catalog import Recipe, load_recipe, recipe, recipes
from precond.cells import Cell, combinations
from precond.errors import (
    InvalidCombination,
    NeedsTrajectory,
    ObservationError,
    PrecondError,
    RefreshFailure,
    SolverFailure,
    UnknownName,
    UsageError,
)
from precond.inversion import inverse
from precond.preconditioner import Preconditioner
from precond.spectra import spectrum
from precond.standalone import curvature

__version__ = "0.1.0"

__all__ = [
    "Auto", "Cell", "InvalidCombination", "NeedsTrajectory", "ObservationError", "PrecondError", "Preconditioner", "Recipe", "RefreshFailure",
    "SolverFailure", "UnknownName", "UsageError", "combinations", "curvature", "damping", "history", "inverse", "layers", "likelihoods",
    "load_recipe", "matrices", "operators", "recipe", "recipes", "representations", "solvers", "spectrum", "transforms",
]  # fmt: skip
