"""The matrix axis: what C is. One file a member; its name is its registry key."""

from precond.matrices.abs_hessian import AbsHessian
from precond.matrices.base import REGISTRY, Matrix
from precond.matrices.batched_empirical_fisher import BatchedEmpiricalFisher
from precond.matrices.batched_fisher_mc import BatchedFisherMC
from precond.matrices.bfgs_hessian import BFGSHessian
from precond.matrices.empirical_fisher import EmpiricalFisher
from precond.matrices.fisher import Fisher
from precond.matrices.fisher_mc import FisherMC
from precond.matrices.ggn import GGN
from precond.matrices.ggn_recursive import GGNRecursive
from precond.matrices.gradient_covariance import GradientCovariance
from precond.matrices.hessian import Hessian
from precond.matrices.input_second_moment import InputSecondMoment

names = REGISTRY.names
get = REGISTRY.get
register = REGISTRY.register

__all__ = [
    "GGN", "REGISTRY", "AbsHessian", "BFGSHessian", "BatchedEmpiricalFisher", "BatchedFisherMC", "EmpiricalFisher", "Fisher", "FisherMC",
    "GGNRecursive", "GradientCovariance", "Hessian", "InputSecondMoment", "Matrix", "get", "names", "register",
]  # fmt: skip
