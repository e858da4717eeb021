"""Random vectors over the parameters, and what the matrix makes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from precond.observe.observation import Distribution, Probes, Tensors
from precond.randomness import keyed_generator


def probes(params: Mapping[str, Tensor], product: Callable[[Tensors], Tensors], *key: int) -> Probes:
    """Pairs (v, C v): one product for each sample."""

    def draw(distribution: Distribution, samples: int) -> tuple[Tensors, Tensors]:
        v = _draw(params, distribution, samples, key)
        return v, product(v)

    return Probes(functools.cache(draw))


def whitening(gradients: Mapping[str, Tensor], *key: int) -> Probes:
    """Pairs (v, g) of the gradient of the step and noise."""

    def draw(distribution: Distribution, samples: int) -> tuple[Tensors, Tensors]:
        v = _draw(gradients, distribution, samples, key)
        return v, {n: g.unsqueeze(0).expand_as(v[n]) for n, g in gradients.items()}

    return Probes(functools.cache(draw))


def _draw(like: Mapping[str, Tensor], distribution: Distribution, samples: int, key: tuple[int, ...]) -> Tensors:
    """Each parameter by a key of its own, so that its draw does not depend on which others there are; on the CPU, so that not on the device either."""
    return {name: _vector(p, distribution, samples, keyed_generator(torch.device("cpu"), "probes", distribution, *key, name)) for name, p in like.items()}


def _vector(like: Tensor, distribution: Distribution, samples: int, generator: torch.Generator) -> Tensor:
    shape = (samples, *like.shape)
    if distribution == "rademacher":
        drawn = torch.randint(2, shape, generator=generator).to(like.dtype) * 2 - 1
    else:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32).to(like.dtype)
    return drawn.to(like.device)
