"""Structured symmetric operators: what a representation gives and a solver inverts."""

from __future__ import annotations

from precond.operators.absolute import Absolute
from precond.operators.base import Operator
from precond.operators.block_diagonal import BlockDiagonal
from precond.operators.dense import Dense
from precond.operators.diagonal import Diagonal
from precond.operators.gram import Gram
from precond.operators.inverse import Inverse, InverseBlockDiagonal
from precond.operators.kronecker import Kronecker
from precond.operators.kronecker_eigen import KroneckerEigen
from precond.operators.kronecker_sum import KroneckerSum
from precond.operators.low_rank import LowRank
from precond.operators.low_rank_eigen import LowRankEigen
from precond.operators.matrix_free import MatrixFree
from precond.operators.modes import mode_products, outer
from precond.operators.packing import pack, unpack
from precond.operators.pairs import Fit, FitName, ModeForm, Pairs
from precond.operators.repeated import Repeated
from precond.operators.row_form import RowForm
from precond.operators.secant import Probed, Secant, SecantKronecker
from precond.operators.secant_memory import SecantMemory
from precond.operators.shifted import RootShifted, Shifted
from precond.operators.sparse import Sparse
from precond.operators.sparse_precision import MadePrecision, SparsePrecision
from precond.operators.spectral import Spectral

__all__ = [
    "Absolute",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "Fit",
    "FitName",
    "Gram",
    "Inverse",
    "InverseBlockDiagonal",
    "Kronecker",
    "KroneckerEigen",
    "KroneckerSum",
    "LowRank",
    "LowRankEigen",
    "MadePrecision",
    "MatrixFree",
    "ModeForm",
    "Operator",
    "Pairs",
    "Probed",
    "Repeated",
    "RootShifted",
    "RowForm",
    "Secant",
    "SecantKronecker",
    "SecantMemory",
    "Shifted",
    "Sparse",
    "SparsePrecision",
    "Spectral",
    "mode_products",
    "outer",
    "pack",
    "unpack",
]
