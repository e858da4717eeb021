"""What a criterion says of one batch, by plain code: its terms, their losses, weights, labels and factor columns.

Claims, all with N_terms the number that a mean reduction divides by:

* `criterion(output, targets) == scale(...) * term_losses(...).sum()`, for every option of the three criteria;
* a *term* is a row of `rows(criterion, output)`: one target position of CrossEntropyLoss (class dimension 1), or one row along the last
  dimension of MSELoss and BCEWithLogitsLoss (its mean over that dimension for 'mean', its sum for 'sum'; 1-D output is K = 1);
* an *example* is one index of the leading dimension of the model's input, and owns the rows r with r // (rows / batch) == example;
* `scale(...)` is 1 / N_terms for 'mean' and 1 for 'sum'. N_terms is the weight of the non-ignored targets for CrossEntropyLoss, the
  number of rows otherwise.

Curvature weights. The Hessian of a cross-entropy term in its logits is m (diag p - p p^T), where m is the total mass of its (weighted,
smoothed) target: the class weight w_y for a plain label, 1 without weights, 0 when ignored. That of one BCE unit is m p (1 - p) with
m = weight (1 + (pos_weight - 1) y). Labels of the model are scored by the plain -log p times sqrt(m), so that m enters once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Criterion = nn.Module


def _event_factor(criterion: Criterion, events: int) -> float:
    """What multiplies the sum over the last dimension of an elementwise criterion."""
    return 1.0 / events if criterion.reduction == "mean" else 1.0


def rows(criterion: Criterion, output: Tensor) -> Tensor:
    """The output as (terms, event), row-major in (example, position)."""
    if isinstance(criterion, nn.CrossEntropyLoss):
        return output.movedim(min(1, output.dim() - 1), -1).reshape(-1, output.shape[min(1, output.dim() - 1)])
    return output.reshape(-1, output.shape[-1] if output.dim() > 1 else 1)


def unrows(criterion: Criterion, values: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `rows`: (terms, event) back to the shape of the output."""
    if isinstance(criterion, nn.CrossEntropyLoss) and len(shape) > 2:
        return values.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()
    return values.reshape(shape)


def term_losses(criterion: Criterion, output: Tensor, targets: Tensor) -> Tensor:
    """The loss of each term, unscaled, as (terms,); zero where the target is ignored."""
    if criterion.reduction not in ("mean", "sum"):
        raise ValueError(f"The oracle knows the reductions 'mean' and 'sum', not {criterion.reduction!r}.")
    if isinstance(criterion, nn.CrossEntropyLoss):
        options = {"weight": criterion.weight, "ignore_index": criterion.ignore_index, "label_smoothing": criterion.label_smoothing}
        return F.cross_entropy(output, targets, reduction="none", **options).flatten()
    if targets.shape != output.shape:
        raise ValueError(f"Targets {tuple(targets.shape)} and output {tuple(output.shape)} differ in shape.")
    if isinstance(criterion, nn.MSELoss):
        each = F.mse_loss(output, targets, reduction="none")
    elif isinstance(criterion, nn.BCEWithLogitsLoss):
        options = {"weight": criterion.weight, "pos_weight": criterion.pos_weight}
        each = F.binary_cross_entropy_with_logits(output, targets, reduction="none", **options)
    else:
        raise TypeError(f"The oracle knows no terms of {type(criterion).__name__}.")
    each = rows(criterion, each)
    return each.sum(1) * _event_factor(criterion, each.shape[1])


def terms(criterion: Criterion, output: Tensor, targets: Tensor) -> float:
    """N_terms: what a mean reduction divides the sum of the term losses by."""
    if not isinstance(criterion, nn.CrossEntropyLoss) or targets.is_floating_point():
        return float(rows(criterion, output).shape[0])
    kept = targets[targets != criterion.ignore_index]
    return float(kept.numel() if criterion.weight is None else criterion.weight[kept].sum())


def scale(criterion: Criterion, output: Tensor, targets: Tensor) -> float:
    """The factor between the sum of the term losses and the loss: 1 / N_terms for 'mean', 1 for 'sum'."""
    return 1.0 / terms(criterion, output, targets) if criterion.reduction == "mean" else 1.0


def curvature_weights(criterion: Criterion, output: Tensor, targets: Tensor) -> Tensor:
    """The weight m of each output unit in the Hessian of its term, as (terms, event); see the head of this file."""
    shape = rows(criterion, output).shape
    ones = torch.ones(shape, dtype=output.dtype)
    if isinstance(criterion, nn.CrossEntropyLoss):
        weight = torch.ones(shape[1], dtype=output.dtype) if criterion.weight is None else criterion.weight
        if targets.is_floating_point():
            mass, kept = rows(criterion, targets), ones[:, 0]
        else:
            flat = targets.flatten()
            kept = (flat != criterion.ignore_index).to(output.dtype)
            mass = F.one_hot(torch.where(kept.bool(), flat, 0), shape[1]).to(output.dtype)
        mass = (1 - criterion.label_smoothing) * mass + criterion.label_smoothing / shape[1]
        return (kept * (mass * weight).sum(1)).unsqueeze(1) * ones
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        weight = torch.ones_like(output) if criterion.weight is None else criterion.weight.expand_as(output)
        positive = torch.ones_like(output) if criterion.pos_weight is None else criterion.pos_weight.expand_as(output)
        return rows(criterion, weight * (1 + (positive - 1) * targets)).detach()
    return ones


def model_labels(criterion: Criterion, row: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every label of one term under the model, as (probability, loss that carries the graph).

    The expectation of the outer product of the loss's gradient is the term's exact Fisher matrix. Classes: all C. Bernoulli: all 2^K
    joint labels. Normal: the 2 K sigma points f +- sqrt(v K) e_k, whose second moment is v I exactly; v is the variance for which
    the criterion is the negative log-likelihood, K / 2 for 'mean' and 1 / 2 for 'sum'.
    """
    events = row.numel()
    factor = _event_factor(criterion, events)
    if isinstance(criterion, nn.CrossEntropyLoss):
        log_p = row.log_softmax(0)
        for label in range(events):
            yield log_p[label].detach().exp(), -weight[label].sqrt() * log_p[label]
    elif isinstance(criterion, nn.BCEWithLogitsLoss):
        for label in itertools.product((-1.0, 1.0), repeat=events):
            log_p = F.logsigmoid(row * torch.tensor(label, dtype=row.dtype))
            yield log_p.sum().detach().exp(), -math.sqrt(factor) * (weight.sqrt() * log_p).sum()
    else:
        variance = 0.5 / factor
        for index, sign in itertools.product(range(events), (-1.0, 1.0)):
            target = row.detach().clone()
            target[index] += sign * math.sqrt(variance * events)
            yield torch.tensor(0.5 / events, dtype=row.dtype), factor * (row - target).square().sum()


def factor_columns(criterion: Criterion, row: Tensor, weight: Tensor) -> Tensor:
    """S of one term, (event, event), S S^T the Hessian of its loss in the output; column k is a cotangent (methods B.2)."""
    factor = _event_factor(criterion, row.numel())
    if isinstance(criterion, nn.CrossEntropyLoss):
        p = row.softmax(0)
        return weight[0].sqrt() * (p.sqrt().diag() - torch.outer(p, p.sqrt()))
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        p = row.sigmoid()
        return (factor * weight * p * (1 - p)).sqrt().diag()
    return math.sqrt(2 * factor) * torch.eye(row.numel(), dtype=row.dtype)


def exact_cotangents(criterion: Criterion, output: Tensor, targets: Tensor, batch: int) -> Tensor:
    """Columns (K, *output.shape) for which scale * sum_ik (J_i^T s_ik)(J_i^T s_ik)^T is the exact GGN, whatever mixes positions.

    One column per (position of an example, output unit): column (t, c) is column c of S at position t of every example, and zero at
    the others. Ignored terms are zero. K = terms per example * event size.
    """
    flat = rows(criterion, output.detach())
    weights = curvature_weights(criterion, output.detach(), targets)
    count, events = flat.shape
    positions = count // batch
    columns = torch.zeros(positions, events, count, events, dtype=output.dtype)
    for row in range(count):
        columns[row % positions, :, row] = factor_columns(criterion, flat[row], weights[row]).T
    return torch.stack([unrows(criterion, column, output.shape) for column in columns.reshape(-1, count, events)])
