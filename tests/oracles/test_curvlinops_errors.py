"""Where curvlinops 3.0.1 is wrong without an error, as negative controls; `tests/test_silent_errors.py` has the right answers.

- Targets in probabilities: its K-FAC is the number of classes too large.
- Label smoothing and class weights with sampled labels: it scores a sample by the smoothed, weighted loss, so that the expectation of
  its K-FAC over the labels is not the Fisher matrix. Without these options it is: labels are enumerated, nothing is drawn.
- A module called twice: its input factor is the sum of both calls', and its K-FAC twice too large.
- A grouped convolution: it averages the patches of the groups and has one product for all, where the groups have nothing in common.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dense
import dense_kron
from nets import CASES, Case, normal
from oracles.peers import NETS, close, curvlinops

W = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def kfac(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, label: int | None = None) -> Tensor:
    """Its K-FAC in full: from the exact loss-Hessian, or from one label given in place of the sampled ones."""

    class Given(curvlinops.KFACLinearOperator):
        def draw_label(self, output: Tensor) -> Tensor:
            return torch.full((len(output),), label)

    how = "type-2" if label is None else "mc"
    C = Given(
        model, criterion, list(model.parameters()), [(x, y)], check_deterministic=False, fisher_type=how, separate_weight_and_bias=False
    )
    return C @ torch.eye(C.shape[1], dtype=torch.float64)


def right(case: Case, layer: str) -> Tensor:
    """The oracle's K-FAC of a layer."""
    model = case.make()
    sent = dense.exact_cotangents(case.criterion, dense.predict(model, case.inputs), case.targets, len(case.inputs))
    pairs = dense_kron.kron_expand(model, case.criterion, case.inputs, case.targets, sent, layer)
    return torch.block_diag(*(torch.kron(B.contiguous(), A.contiguous()) for B, A in (pairs if isinstance(pairs, list) else [pairs])))


def wrong(case: Case, layer: str) -> Tensor:
    model = case.make()
    place = dense.joint_indices(model, layer)
    return kfac(model, case.criterion, case.inputs, case.targets)[place][:, place]


def test_targets_in_probabilities_are_scaled_by_the_number_of_classes() -> None:
    net = NETS["mlp-mean"]
    case = Case("soft", net.make, net.criterion, net.inputs, normal(6, 3, seed=4).softmax(1))
    close(wrong(case, "0"), 3 * right(case, "0"))
    close(wrong(net, "0"), right(net, "0"))


@pytest.mark.parametrize(("options", "holds"), [({}, True), ({"label_smoothing": 0.3}, False), ({"weight": W}, False)], ids=str)
def test_the_expectation_over_labels_is_the_fisher_matrix_only_without_options(options: dict, holds: bool) -> None:
    net, criterion = NETS["mlp-sum"], nn.CrossEntropyLoss(reduction="sum", **options)
    model, x, y = net.make(), net.inputs[:1], net.targets[:1]
    p = dense.predict(model, x).softmax(1)[0]
    expectation = sum(p[label] * kfac(model, criterion, x, y, label) for label in range(3))
    fisher = dense.project_layer(dense.fisher(model, criterion, x, y), model)  # of one example: a Kronecker product
    if holds:
        close(expectation, fisher)
    else:
        assert (expectation - fisher).norm() > 0.1 * fisher.norm()


def test_a_module_called_twice_counts_its_inputs_twice() -> None:
    case = CASES["reused"]
    close(wrong(case, "layer"), 2 * right(case, "layer"))
    close(wrong(case, "head"), right(case, "head"))


def test_groups_of_a_convolution_are_averaged() -> None:
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 3)).double()

    case = Case("grouped", make, nn.CrossEntropyLoss(), normal(4, 2, 3, 3), NETS["conv-mean"].targets)
    got, want = wrong(case, "0"), right(case, "0")
    assert (got - want).norm() > 0.1 * want.norm()
    assert got[:10, 10:].norm() > 0.01 * want.norm() and want[:10, 10:].norm() == 0
    close(wrong(case, "2"), right(case, "2"))
