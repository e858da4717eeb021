"""The representation axis: how C is held. One file a member; its name is its registry key."""

from precond.representations.base import REGISTRY, Representation
from precond.representations.diagonal import Diagonal
from precond.representations.diagonal_sparse import DiagonalSparse
from precond.representations.full import Full
from precond.representations.full_gram import FullGram
from precond.representations.full_low_rank import FullLowRank
from precond.representations.full_sparse import FullSparse
from precond.representations.kron_dim import KronDim
from precond.representations.kron_eigen import KronEigen
from precond.representations.kron_io import KronIO
from precond.representations.layer import Layer
from precond.representations.layer_gram import LayerGram
from precond.representations.layer_low_rank import LayerLowRank
from precond.representations.layer_sparse import LayerSparse
from precond.representations.matrix_free import MatrixFree
from precond.representations.unit import Unit
from precond.representations.unit_gram import UnitGram
from precond.representations.unit_low_rank import UnitLowRank

names = REGISTRY.names
get = REGISTRY.get
register = REGISTRY.register

__all__ = [
    "REGISTRY", "Diagonal", "DiagonalSparse", "Full", "FullGram", "FullLowRank", "FullSparse", "KronDim", "KronEigen", "KronIO", "Layer",
    "LayerGram", "LayerLowRank", "LayerSparse", "MatrixFree", "Representation", "Unit", "UnitGram", "UnitLowRank", "get", "names",
    "register",
]  # fmt: skip
