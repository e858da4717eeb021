"""Transforms: what is applied around the preconditioner, in order; each sees gradients, directions and learning rates by block."""

from precond.transforms.base import Scene, State, Transform, Vectors
from precond.transforms.clips import ElementClip, KLClip, NormClip, RMSClip
from precond.transforms.graft import Graft
from precond.transforms.momentum import Momentum
from precond.transforms.rescale import Rescale
from precond.transforms.scale import ShapeScale
from precond.transforms.search import Backtrack, Reject

__all__ = [
    "Backtrack", "ElementClip", "Graft", "KLClip", "Momentum", "NormClip", "RMSClip", "Reject", "Rescale", "Scene", "ShapeScale", "State",
    "Transform", "Vectors",
]  # fmt: skip
