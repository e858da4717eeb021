"""Structured symmetric operators: what a representation gives and a solver inverts."""

from __future__ import annotations

from precond.operators.base import Operator
from precond.operators.block_diagonal import BlockDiagonal
from precond.operators.dense import Dense
from precond.operators.diagonal import Diagonal
from precond.operators.inverse import Inverse, InverseBlockDiagonal
from precond.operators.kronecker import Kronecker
from precond.operators.kronecker_eigen import KroneckerEigen
from precond.operators.matrix_free import MatrixFree
from precond.operators.modes import mode_products, outer
from precond.operators.packing import pack, unpack
from precond.operators.shifted import RootShifted, Shifted

__all__ = [
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "Inverse",
    "InverseBlockDiagonal",
    "Kronecker",
    "KroneckerEigen",
    "MatrixFree",
    "Operator",
    "RootShifted",
    "Shifted",
    "mode_products",
    "outer",
    "pack",
    "unpack",
]
