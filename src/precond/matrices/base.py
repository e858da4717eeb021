"""A matrix: what C is, by what is sent backwards from the model's output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from precond.observe import Context, Kind, Link, Tensors
from precond.operators import Operator
from precond.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Matrix(ABC):
    """One curvature matrix.

    supplies: the kinds of observation it can give. definite: positive semi-definite by construction.
    true_gradient: its columns are those of the user's own backward pass. needs: shown by `precond list matrices`.
    """

    name: ClassVar[str]
    definite: ClassVar[bool] = True
    needs: ClassVar[str]

    @property
    @abstractmethod
    def supplies(self) -> tuple[Kind, ...]:
        """The kinds of observation it can give; a class attribute for most."""

    @property
    def true_gradient(self) -> bool:
        return False

    @property
    def needs_trajectory(self) -> bool:
        """It has no value from one batch: it is made from pairs along the optimizer's path."""
        return False

    @property
    def second_order(self) -> bool:
        """Its products differentiate the gradient of the loss again instead of passing through output space."""
        return False

    @property
    def centred(self) -> bool:
        """Less the outer product of the mean gradient; the mean is averaged beside the second moment."""
        return False

    @property
    def sampled(self) -> bool:
        """Its gradient is taken at labels drawn from the model, not at those of the step."""
        return False

    @property
    def counts_terms(self) -> bool:
        """Its gradient is that of the step, multiplied by the root of the number of terms."""
        return False

    @property
    def of_momentum(self) -> bool:
        """Its gradient is the vector that is preconditioned: the step's, after what transforms made of it."""
        return False

    @property
    def chained(self) -> bool:
        """The moments of outputs follow from one another along a sequential model, by `output_moments`."""
        return False

    def refuse(self, model: nn.Module) -> str | None:
        """Why there is no such matrix of a model, or None."""
        return None

    def output_moments(self, links: Sequence[Link], output: Tensor, slopes: Tensors) -> Tensors:
        """The moment of the gradient at the output of every link, by name and (*out, *out), from averages over the examples of a step.

        output: at the last link, scale folded in. slopes: E[phi' phi'^T] by element-wise link, (*shape, *shape).
        """
        raise NotImplementedError(f"{self.name} is not passed along a chain.")

    def finish(self, operator: Operator) -> Operator:
        """What is not linear in the average, applied to its operator; the identity for most."""
        return operator

    @property
    def needs_criterion(self) -> bool:
        """Fed by more than the gradient of the step."""
        return self.supplies != ("gradient",) or self.sampled or self.counts_terms

    def cotangents(self, context: Context) -> Tensor:
        """(K, *output.shape), per term and unscaled: C = scale * sum_ik (J_i^T s_ik)(J_i^T s_ik)^T."""
        raise NotImplementedError(f"{self.name} has no columns.")

    def chunks(self, context: Context, limit: int) -> Iterator[Tensor]:
        """`cotangents` a few columns at a time, at most `limit`."""
        yield from self.cotangents(context).split(limit)

    def output_product(self, context: Context, frozen: Tensor | None, vector: Tensor) -> Tensor:
        """S S^T v in output space, from cotangents frozen for the whole solve; examples are independent."""
        assert frozen is not None
        wide = frozen.to(vector.dtype)
        shape = (wide.shape[0], context.batch, -1)
        inner = (wide.reshape(shape) * vector.reshape(1, context.batch, -1)).sum(-1)
        return torch.einsum("kn,kno->no", inner, wide.reshape(shape)).reshape(vector.shape)

    def frozen(self, context: Context) -> Tensor | None:
        """What must not change within a solve: drawn labels, or the columns themselves."""
        return self.cotangents(context)


REGISTRY: Registry[Matrix] = Registry("matrices", Matrix)  # type: ignore[type-abstract]
