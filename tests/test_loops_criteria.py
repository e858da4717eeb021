"""Claims about losses that are not one criterion on one output:

- `observe(loss, output, target)` with a functional loss, the likelihood given by name or as an object, is the plain loop;
- a list of criteria is several losses of the step; a model with two outputs, in a tuple or a dict, may have a criterion on each: the GGN and
  the Fisher add, the empirical Fisher forms one gradient of an example's summed terms.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import dense
import precond
from nets import seeded
from training import EXACT, KINDS, batches, fit, make, net, of, same, sgd

every = pytest.mark.parametrize("kind", KINDS)


@every
@pytest.mark.parametrize("given", ["name", "likelihood"])
def test_observe_with_a_functional_loss(kind: str, given: str) -> None:
    if kind == "newton":
        with pytest.raises(precond.ObservationError, match=r"Hessian differentiates the criterion itself.*use the matrix 'ggn'"):
            functional(kind, given)
    else:
        same(functional(kind, given), fit(KINDS[kind]()))


def functional(kind: str, given: str) -> nn.Module:
    model, preconditioner = net(), KINDS[kind]()
    optimizer = sgd(model)
    preconditioner.attach(model, "categorical" if given == "name" else precond.likelihoods.Categorical(), optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        f = model(x)
        loss = F.cross_entropy(f, y)
        assert preconditioner.observe(loss, f, y) is loss
        loss.backward()
        optimizer.step()
    return model


def test_a_list_of_criteria_is_several_losses_of_the_step() -> None:
    model, criteria = net(), [nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")]
    preconditioner, (x, y) = make(loss_weights="given").attach(model, criteria), batches(1)[0]
    targets, f = torch.ones(6, 3, dtype=torch.float64), model(x)
    (criteria[0](f, y) + 0.5 * criteria[1](f, targets)).backward()
    preconditioner.step()
    C = of("ggn")(net(), x, y) + 0.5 * of("ggn", criteria[1])(net(), x, targets)
    assert_close(preconditioner.operators["model"].to_dense(), C, **EXACT)


class TwoHeads(nn.Module):
    """A shared layer and two heads; returns both, or one of them for the oracle."""

    def __init__(self, head: int | None = None, nest: type = tuple) -> None:
        super().__init__()
        self.shared, self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)
        self.head, self.nest = head, nest

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.shared(x))
        both = self.first(h), self.second(h)
        return both[self.head] if self.head is not None else dict(zip("ab", both, strict=True)) if self.nest is dict else both


@pytest.mark.parametrize("nest", [tuple, dict])
@pytest.mark.parametrize("cell", [("ggn", "full"), ("fisher", "full"), ("empirical_fisher", "full"), ("ggn", "kron_io")], ids="-".join)
def test_a_model_with_two_outputs_and_a_criterion_on_each(cell: tuple[str, str], nest: type) -> None:
    model, criteria, (x, y) = seeded(lambda: TwoHeads(nest=nest)), [nn.CrossEntropyLoss(), nn.MSELoss()], batches(1)[0]
    preconditioner = make(*cell, loss_weights="given").attach(model, criteria)
    f = model(x)
    a, b = f.values() if nest is dict else f
    targets = torch.ones(6, 2, dtype=x.dtype)
    (criteria[0](a, y) + criteria[1](b, targets)).backward()
    preconditioner.step()
    heads = [(seeded(lambda: TwoHeads(0)), criteria[0], x, y), (seeded(lambda: TwoHeads(1)), criteria[1], x, targets)]
    if cell[0] == "empirical_fisher":
        U = sum(dense.per_example_gradients(*head) for head in heads)
        C = U.T @ U / 6
    else:
        C = sum(getattr(dense, cell[0])(*head) for head in heads)
    if cell[1] == "kron_io":  # the last layer's C is B (x) A only in the mean over examples: its trace over A's ones is exact
        B = [preconditioner.operators[name].factors[0].to_dense() for name in ("first", "second")]
        place = 25 + 15
        assert_close(B[0], C[place : place + 3, place : place + 3], **EXACT)
        assert_close(B[1], C[-2:, -2:], **EXACT)
    else:
        assert_close(preconditioner.operators["model"].to_dense(), C, **EXACT)
