"""Likelihoods: what a criterion stands for. `resolve` turns what the user gave into one."""

from __future__ import annotations

from torch import Tensor, nn

from precond.errors import ObservationError
from precond.likelihoods.base import Likelihood
from precond.likelihoods.bernoulli import Bernoulli
from precond.likelihoods.categorical import Categorical
from precond.likelihoods.columns import exact_column_chunks, exact_columns
from precond.likelihoods.elementwise import Elementwise
from precond.likelihoods.gaussian_nll import GaussianMeanVariance, GaussianNLL
from precond.likelihoods.normal import Normal
from precond.likelihoods.weighted import Weighted, weigh
from precond.registry import Registry

__all__ = [
    "REGISTRY", "Bernoulli", "Categorical", "Elementwise", "GaussianMeanVariance", "GaussianNLL", "Likelihood", "Normal", "Weighted",
    "exact_column_chunks", "exact_columns", "resolve", "weigh",
]  # fmt: skip

REGISTRY: Registry[Likelihood] = Registry("likelihoods", Likelihood)  # type: ignore[type-abstract]
for _member in (Categorical, Normal, Bernoulli, GaussianNLL):
    REGISTRY.register(_member.name)(_member)


def resolve(criterion: nn.Module | Likelihood | str) -> Likelihood:
    """The likelihood of a criterion module, of a name, or the likelihood itself."""
    if isinstance(criterion, Likelihood):
        return criterion
    if isinstance(criterion, str):
        return REGISTRY.get(criterion)()
    members = (REGISTRY.get(n) for n in REGISTRY.names())
    supported = {member.criterion: member for member in members if member.criterion is not None}  # the user's own in place of ours
    kind = next((base for base in type(criterion).__mro__ if base in supported), None)
    if kind is not None and isinstance(criterion, nn.Module):
        if type(criterion).forward is not kind.forward:
            raise ObservationError(
                f"{type(criterion).__name__} computes another loss than nn.{kind.__name__}, from which it is derived: register a likelihood for "
                "it (docs/likelihoods.md), or name one together with `preconditioner.observe(loss, output, target)`."
            )
        return _checked(supported[kind].from_criterion(criterion), criterion)
    names = ", ".join(f"nn.{kind.__name__}" for kind in supported)
    what = f"a {type(criterion).__name__}" if isinstance(criterion, nn.Module) else f"{criterion!r}, which is not a module"
    raise ObservationError(
        f"the criterion is {what}, and no likelihood is known for it. Use one of {names}, a precond.likelihoods.Likelihood, "
        f"or a name ({', '.join(REGISTRY.names())}) together with `preconditioner.observe(loss, output, target)`."
    )


def _checked(likelihood: Likelihood, criterion: nn.Module) -> Likelihood:
    for option, value in vars(likelihood).items():
        if isinstance(value, Tensor) and bool((value < 0).any()):
            raise ObservationError(f"{type(criterion).__name__}({option}=...) holds negative numbers, so that its curvature is indefinite.")
    return likelihood
