"""Damping: an object maps an operator to a damped operator, whose dense matrix is what a solver must invert."""

from precond.damping.base import BLOCK, SMALLEST, Amount, Damping, Move, ValueSchedule
from precond.damping.blockwise import Blockwise
from precond.damping.factored import Factored
from precond.damping.floor import Floor
from precond.damping.levenberg_marquardt import LevenbergMarquardt
from precond.damping.outside import Outside
from precond.damping.per_factor import PerFactor
from precond.damping.relative import Relative
from precond.damping.tikhonov import Tikhonov, resolve

__all__ = [
    "BLOCK", "SMALLEST", "Amount", "Blockwise", "Damping", "Factored", "Floor", "LevenbergMarquardt", "Move", "Outside", "PerFactor", "Relative", "Tikhonov",
    "ValueSchedule", "resolve",
]  # fmt: skip
