"""The categorical distribution: `nn.CrossEntropyLoss`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from precond.errors import ObservationError
from precond.likelihoods.base import Likelihood, check_criterion, full


class Categorical(Likelihood):
    """-log softmax(f)_y, with the class dimension where `nn.CrossEntropyLoss` has it.

    Output (C,), (N, C) or (N, C, d1, ...); target of the same shape without C, in class indices. Terms with target
    `ignore_index` count nowhere. S = diag(sqrt p) - p sqrt(p)^T, column c = sqrt(p_c) (e_c - p); S S^T = diag p - p p^T.
    """

    name = "categorical"
    criterion = nn.CrossEntropyLoss

    def __init__(self, reduction: str = "mean", ignore_index: int = -100) -> None:
        super().__init__(reduction)
        self.ignore_index = ignore_index

    @classmethod
    def from_criterion(cls, criterion: nn.Module) -> Categorical:
        assert isinstance(criterion, nn.CrossEntropyLoss)
        check_criterion(criterion, {"weight": None, "label_smoothing": 0.0})
        return cls(criterion.reduction, criterion.ignore_index)

    def event(self, output: Tensor) -> tuple[int, ...]:
        return (0 if output.dim() == 1 else 1,)

    def _mask(self, output: Tensor, target: Tensor) -> Tensor:
        """1 where a term counts, 0 where it is ignored; broadcasts against `output`."""
        if target.is_floating_point():
            raise ObservationError("targets of nn.CrossEntropyLoss given as probabilities are not modelled: pass class indices.")
        return (target != self.ignore_index).unsqueeze(*self.event(output))

    def _probabilities(self, output: Tensor) -> Tensor:
        return full(output).softmax(self.event(output)[0])

    def terms(self, output: Tensor, target: Tensor) -> Tensor:
        return self._mask(output, target).sum()

    def _minus_one_hot(self, p: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """(p - e_label) on the terms that count."""
        dim = self.event(p)[0]
        labels = torch.where(mask, labels.unsqueeze(dim), 0)
        return (p - torch.zeros_like(p).scatter_(dim, labels, 1.0)) * mask

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        return self._minus_one_hot(self._probabilities(output), target, self._mask(output, target))

    def factor(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        (dim,) = self.event(output)
        p, mask = self._probabilities(output), self._mask(output, target)
        root = (0.5 * full(output).log_softmax(dim)).exp()
        for c in range(output.shape[dim]):
            column = -p * root.select(dim, c).unsqueeze(dim)
            column.select(dim, c).add_(root.select(dim, c))
            yield column * mask

    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        (dim,) = self.event(output)
        p = self._probabilities(output)
        rows = p.movedim(dim, -1).nan_to_num(1.0)  # a row that is not finite still draws a label; its cotangent stays NaN and is dropped
        labels = torch.multinomial(rows.reshape(-1, rows.shape[-1]), 1, generator=generator).view(rows.shape[:-1])
        return self._minus_one_hot(p, labels, self._mask(output, target))

    def hessian_product(self, output: Tensor, target: Tensor, vector: Tensor) -> Tensor:
        (dim,) = self.event(output)
        p = self._probabilities(output)
        pv = p * vector
        return (pv - p * pv.sum(dim, keepdim=True)) * self._mask(output, target)
