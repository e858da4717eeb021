"""The exact columns of a likelihood's factor, one position of an example at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from precond.errors import ObservationError
from precond.likelihoods.base import Likelihood


def positions(likelihood: Likelihood, output: Tensor, batch: int) -> tuple[Tensor, int]:
    """The position of every term within its example, broadcastable against `output`, and how many there are."""
    event = likelihood.event(output)
    shape = [1 if d in event else size for d, size in enumerate(output.shape)]
    count = math.prod(shape)
    if count % batch:
        raise ObservationError(
            f"the criterion's input has shape {tuple(output.shape)}, {count} terms for a batch of {batch} examples, so its terms cannot be told "
            "apart by example: let the batch be the leading dimension of the model's input and of its output."
        )
    per_example = count // batch
    return (torch.arange(count, device=output.device) % per_example).view(shape), per_example


def exact_columns(likelihood: Likelihood, output: Tensor, target: Tensor, batch: int) -> Tensor:
    """(T * C, *output.shape): one column a class (or output) and position.

    Sending a class back from all positions of an example at once would add cross terms as soon as the network mixes
    positions (attention, convolution), so each position has its own column.
    """
    return torch.stack(list(_columns(likelihood, output, target, batch)))


def exact_column_chunks(likelihood: Likelihood, output: Tensor, target: Tensor, batch: int, limit: int) -> Iterator[Tensor]:
    """`exact_columns` at most `limit` at a time: a thousand classes are never held together."""
    columns = _columns(likelihood, output, target, batch)
    while chunk := list(itertools.islice(columns, limit)):
        yield torch.stack(chunk)


def _columns(likelihood: Likelihood, output: Tensor, target: Tensor, batch: int) -> Iterator[Tensor]:
    position, count = positions(likelihood, output, batch)
    for t in range(count):
        for column in likelihood.factor(output, target):
            yield column if count == 1 else column * (position == t)
