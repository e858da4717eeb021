"""The categorical distribution: `nn.CrossEntropyLoss`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from precond.likelihoods.base import Likelihood, full


class Categorical(Likelihood):
    """-sum_c w_c q_c log softmax(f)_c, with the class dimension where `nn.CrossEntropyLoss` has it.

    Output (C,), (N, C) or (N, C, d1, ...); target in class indices, of the same shape without C, or in probabilities, of
    the same shape. w: `weight` of the classes. q: the target (one-hot for an index), smoothed to
    (1 - label_smoothing) q + label_smoothing / C. Terms with target `ignore_index` count nowhere.

    With the mass m = sum_c w_c q_c of a term (w_y for a plain label), its gradient is m p - w q and its Hessian
    m (diag p - p p^T) = S S^T, S = sqrt(m) (diag(sqrt p) - p sqrt(p)^T), column c = sqrt(m p_c) (e_c - p). Labels are drawn
    from p = softmax(f) and give sqrt(m) (p - e_label): the smoothing and the weights are the loss's, not the model's.
    A mean divides by sum w_y over the indices that count, and by the number of terms for probabilities, as in torch.
    """

    name = "categorical"
    criterion = nn.CrossEntropyLoss

    def __init__(
        self, reduction: str = "mean", ignore_index: int = -100, weight: Tensor | None = None, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(reduction)
        self.ignore_index, self.weight, self.label_smoothing = ignore_index, weight, label_smoothing

    @classmethod
    def from_criterion(cls, criterion: nn.Module) -> Categorical:
        assert isinstance(criterion, nn.CrossEntropyLoss)
        return cls(criterion.reduction, criterion.ignore_index, criterion.weight, criterion.label_smoothing)

    def event(self, output: Tensor) -> tuple[int, ...]:
        return (0 if output.dim() == 1 else 1,)

    def _probabilities(self, output: Tensor) -> Tensor:
        return full(output).softmax(self.event(output)[0])

    def _mask(self, output: Tensor, target: Tensor) -> Tensor:
        """True where a term counts; broadcasts against `output`."""
        (dim,) = self.event(output)
        if target.is_floating_point():  # torch ignores no term of a target in probabilities
            return torch.ones((), dtype=torch.bool, device=output.device).expand(*output.shape[:dim], 1, *output.shape[dim + 1 :])
        return (target != self.ignore_index).unsqueeze(dim)

    def _labels(self, output: Tensor, target: Tensor) -> Tensor:
        """The class indices with the class dimension kept; 0 where ignored."""
        return torch.where(self._mask(output, target), target.unsqueeze(*self.event(output)), 0)

    def _classes(self, output: Tensor) -> Tensor | None:
        """The weights of the classes, along the class dimension."""
        if self.weight is None:
            return None
        (dim,) = self.event(output)
        return self.weight.detach().to(full(output)).view([-1 if d == dim else 1 for d in range(output.dim())])

    def terms(self, output: Tensor, target: Tensor) -> Tensor:
        mask = self._mask(output, target)
        if self.weight is None or target.is_floating_point():
            return mask
        return self.weight.detach().to(full(output))[self._labels(output, target)] * mask

    def _target(self, output: Tensor, target: Tensor) -> Tensor:
        """W q, in the shape of `output`; zero where ignored."""
        (dim,), like = self.event(output), full(output)
        if target.is_floating_point():
            q = target.detach().to(like)
        else:
            q = torch.zeros_like(like).scatter_(dim, self._labels(output, target), 1.0)
        if self.label_smoothing:
            q = (1 - self.label_smoothing) * q + self.label_smoothing / output.shape[dim]
        weight = self._classes(output)
        return (q if weight is None else q * weight) * self._mask(output, target)

    def _mass(self, output: Tensor, target: Tensor) -> Tensor:
        """M = sum_c w_c q_c of every term, with the class dimension kept."""
        if not target.is_floating_point() and (self.weight is None or not self.label_smoothing):
            return self.terms(output, target).to(full(output).dtype)  # the same without the memory of one number a class
        return self._target(output, target).sum(self.event(output), keepdim=True)

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        return self._probabilities(output) * self._mass(output, target) - self._target(output, target)

    def factor(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        (dim,) = self.event(output)
        p, mass = self._probabilities(output), self._mass(output, target)
        root = (0.5 * full(output).log_softmax(dim)).exp() * mass.sqrt()
        for c in range(output.shape[dim]):
            column = -p * root.select(dim, c).unsqueeze(dim)
            column.select(dim, c).add_(root.select(dim, c))
            yield column

    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        (dim,) = self.event(output)
        p = self._probabilities(output)
        rows = p.movedim(dim, -1).nan_to_num(1.0)  # a row that is not finite still draws a label; its cotangent stays NaN and is dropped
        labels = torch.multinomial(rows.reshape(-1, rows.shape[-1]), 1, generator=generator).view(rows.shape[:-1])
        drawn = torch.zeros_like(p).scatter_(dim, labels.unsqueeze(dim), 1.0)
        return (p - drawn) * self._mass(output, target).sqrt()

    def hessian_product(self, output: Tensor, target: Tensor, vector: Tensor) -> Tensor:
        p = self._probabilities(output)
        pv = p * vector
        return (pv - p * pv.sum(self.event(output), keepdim=True)) * self._mass(output, target)
