"""Likelihoods: what a criterion stands for. `resolve` turns what the user gave into one."""

from __future__ import annotations

from torch import nn

from precond.errors import ObservationError
from precond.likelihoods.base import Likelihood
from precond.likelihoods.bernoulli import Bernoulli
from precond.likelihoods.categorical import Categorical
from precond.likelihoods.columns import exact_columns
from precond.likelihoods.normal import Normal
from precond.registry import Registry

__all__ = ["REGISTRY", "Bernoulli", "Categorical", "Likelihood", "Normal", "exact_columns", "resolve"]

REGISTRY: Registry[Likelihood] = Registry("likelihoods", Likelihood)  # type: ignore[type-abstract]
for _member in (Categorical, Normal, Bernoulli):
    REGISTRY.register(_member.name)(_member)


def resolve(criterion: nn.Module | Likelihood | str) -> Likelihood:
    """The likelihood of a criterion module, of a name, or the likelihood itself."""
    if isinstance(criterion, Likelihood):
        return criterion
    if isinstance(criterion, str):
        return REGISTRY.get(criterion)()
    supported = {REGISTRY.get(n).criterion: REGISTRY.get(n) for n in REGISTRY.names()}
    for kind, likelihood in supported.items():
        if isinstance(criterion, kind):
            return likelihood.from_criterion(criterion)
    names = ", ".join(f"nn.{kind.__name__}" for kind in supported)
    what = f"a {type(criterion).__name__}" if isinstance(criterion, nn.Module) else f"{criterion!r}, which is not a module"
    raise ObservationError(
        f"the criterion is {what}, and no likelihood is known for it. Use one of {names}, a precond.likelihoods.Likelihood, "
        f"or a name ({', '.join(REGISTRY.names())}) together with `preconditioner.observe(loss, output, target)`."
    )
