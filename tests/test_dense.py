"""The dense oracle against itself, by independent routes, in float64 to 1e-10.

Claims:

* every case is deterministic, and the oracle leaves buffers, gradients and the random state as they were;
* the loss is `scale * sum of term losses`, its gradient `scale * sum of per-example gradients`, and the latter are those of each example
  alone, except with BatchNorm in training mode;
* the Hessian agrees with central differences of `backward()`, and with `torch.func.hessian` where that runs; the Jacobian with `jacrev`;
* columns of the true labels give per-example gradients and the empirical Fisher;
* GGN == Fisher by enumeration == the exact cotangents' outer products (identity 1), with class weights, smoothing, soft and ignored
  targets, `pos_weight`; not for NLLLoss fed with log-probabilities;
* Hessian and GGN agree on layer blocks of piecewise linear networks (2), wholly for a linear model (3); not otherwise;
* softmax null space, ranks, symmetry, PSD (12); the rules of reduction (8);
* an unknown criterion is refused.

Projections are in `test_dense_blocks.py`, the Kronecker oracle in `test_dense_kron.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import dense
from nets import CASES, Case, labels, normal, seeded

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def options() -> dict[str, Case]:
    """The cases, and every option of the criteria that changes a term's loss or weight."""
    mlp, bce, tokens = CASES["mlp"], CASES["bce"], CASES["transformer_ignore"]
    w3, w7 = normal(3, seed=7).exp(), normal(7, seed=8).exp()
    soft = normal(6, 3, seed=9).softmax(1)
    more = {
        "ce_sum": replace(mlp, criterion=nn.CrossEntropyLoss(reduction="sum")),
        "ce_weighted": replace(mlp, criterion=nn.CrossEntropyLoss(weight=w3)),
        "ce_smoothed": replace(mlp, criterion=nn.CrossEntropyLoss(weight=w3, label_smoothing=0.2)),
        "ce_soft": replace(mlp, criterion=nn.CrossEntropyLoss(weight=w3, label_smoothing=0.1), targets=soft),
        "ce_tokens": replace(tokens, criterion=nn.CrossEntropyLoss(weight=w7, label_smoothing=0.2)),
        "bce_weighted": replace(bce, criterion=nn.BCEWithLogitsLoss(weight=w3, pos_weight=w3.flip(0))),
        "bce_sum": replace(bce, criterion=nn.BCEWithLogitsLoss(reduction="sum")),
        "mse_flat": replace(
            CASES["mse"],
            make=lambda: seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0))),
            targets=normal(6),
        ),
    }
    return CASES | more


OPTIONS = options()
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_option = pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS.keys())


def loss_of(case: Case) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    return case.make(), case.criterion, case.inputs, case.targets


def relative(difference: Tensor, of: Tensor) -> float:
    return float(difference.norm() / of.norm())


def linear_mse() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    return seeded(lambda: nn.Linear(4, 2)), nn.MSELoss(), normal(6, 4), normal(6, 2)


@each_case
def test_a_case_is_deterministic_and_the_oracle_leaves_no_trace(case: Case) -> None:
    state, model = torch.get_rng_state(), case.make()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = dense.gradient(model, case.criterion, case.inputs, case.targets)
    dense.empirical_fisher(model, case.criterion, case.inputs, case.targets)
    close(dense.gradient(*loss_of(case)), first, rtol=0, atol=0)
    close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@each_option
def test_loss_and_gradient_are_scaled_sums_of_terms(case: Case) -> None:
    model, criterion, inputs, targets = loss_of(case)
    with dense.forward(model, inputs) as output:
        loss = criterion(output, targets)
        close(loss, dense.scale(criterion, output, targets) * dense.term_losses(criterion, output, targets).sum())
        loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    close(dense.gradient(*loss_of(case)), gradient)
    examples = dense.per_example_gradients(*loss_of(case))
    assert examples.shape == (len(inputs), gradient.numel())
    close(dense.scale(criterion, output, targets) * examples.sum(0), gradient)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "bn_train"])
def test_example_gradients_are_those_of_each_example_alone(name: str) -> None:
    model, criterion, inputs, targets = loss_of(OPTIONS[name])
    examples, count = dense.per_example_gradients(model, criterion, inputs, targets), len(targets) // len(inputs)
    for i in range(len(inputs)):
        alone = inputs[i : i + 1], targets[i * count : (i + 1) * count]
        size = dense.terms(criterion, dense.predict(model, alone[0]), alone[1]) if criterion.reduction == "mean" else 1.0
        close(size * dense.gradient(model, criterion, *alone), examples[i])


def test_example_gradients_depend_on_the_batch_when_examples_mix() -> None:
    model, criterion, inputs, targets = loss_of(CASES["bn_train"])
    of_batch = dense.per_example_gradients(model, criterion, inputs, targets)[:2]
    of_pair = dense.per_example_gradients(model, criterion, inputs[:2], targets[:2])
    assert relative(of_pair - of_batch, of_batch) > 0.1


@pytest.mark.parametrize("name", ["transformer_ignore", "mha", "lstm", "reused", "bn_train", "bce"])
def test_hessian_matches_central_differences(name: str) -> None:
    """Along one direction, by the five-point stencil: truncation is of order step^4, rounding 1e-16 / step, so 1e-8 is asked for."""
    model, criterion, inputs, targets = loss_of(CASES[name])
    H = dense.hessian(model, criterion, inputs, targets)
    close(H, H.T)
    direction, step = normal(len(H), seed=6), 1e-4
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    sides = []
    for away in (-2, -1, 1, 2):
        nn.utils.vector_to_parameters(theta + away * step * direction, model.parameters())
        sides.append(dense.gradient(model, criterion, inputs, targets))
    close(H @ direction, (sides[0] - 8 * sides[1] + 8 * sides[2] - sides[3]) / (12 * step), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["mse", "bce", "mse_sum", "reused"])
def test_hessian_and_jacobian_match_torch_func(name: str) -> None:
    model, criterion, inputs, targets = loss_of(CASES[name])
    shapes = {key: p.shape for key, p in model.named_parameters()}

    def output(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        named = {key: part.reshape(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}
        return torch.func.functional_call(model, named, (inputs,))

    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    close(dense.hessian(model, criterion, inputs, targets), torch.func.hessian(lambda t: criterion(output(t), targets))(theta))
    close(dense.jacobian(model, inputs), torch.func.jacrev(lambda t: output(t).flatten())(theta))


@each_option
def test_ggn_is_fisher_is_exact_cotangents(case: Case) -> None:
    model, criterion, inputs, targets = loss_of(case)
    G = dense.ggn(model, criterion, inputs, targets)
    assert G.norm() > 1e-3
    close(dense.fisher(model, criterion, inputs, targets), G)
    columns = dense.exact_cotangents(criterion, dense.predict(model, inputs), targets, len(inputs))
    close(dense.fisher_mc(model, criterion, inputs, targets, columns), G)


@each_option
def test_columns_of_the_true_labels_are_example_gradients_and_give_the_empirical_fisher(case: Case) -> None:
    model, criterion, inputs, targets = loss_of(case)
    output = dense.predict(model, inputs).requires_grad_()
    (cotangent,) = torch.autograd.grad(dense.term_losses(criterion, output, targets).sum(), output)
    examples = dense.per_example_gradients(model, criterion, inputs, targets)
    close(dense.column_gradients(model, criterion, inputs, cotangent.unsqueeze(0)), examples.unsqueeze(0))
    square = dense.fisher_mc(model, criterion, inputs, targets, cotangent.unsqueeze(0))
    close(square, dense.empirical_fisher(model, criterion, inputs, targets))


def test_ggn_is_not_fisher_when_the_output_is_not_the_natural_parameter() -> None:
    """NLLLoss is linear in log-probabilities, so its GGN is zero while the likelihood, and its Fisher, are as before."""
    model, criterion, inputs, targets = loss_of(CASES["mlp"])
    log_p = nn.Sequential(model, nn.LogSoftmax(1))
    close(dense.gradient(log_p, nn.NLLLoss(), inputs, targets), dense.gradient(model, criterion, inputs, targets))
    assert dense.ggn(log_p, nn.NLLLoss(), inputs, targets).norm() == 0
    assert dense.fisher(model, criterion, inputs, targets).norm() > 1e-3


def test_columns_for_all_positions_at_once_are_not_exact_when_positions_mix() -> None:
    model, criterion, inputs, targets = loss_of(CASES["transformer"])
    G = dense.ggn(model, criterion, inputs, targets)
    columns = dense.exact_cotangents(criterion, dense.predict(model, inputs), targets, 3)
    merged = columns.unflatten(0, (5, 7)).sum(0)
    assert relative(dense.fisher_mc(model, criterion, inputs, targets, merged) - G, G) > 0.1


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_hessian_is_ggn_on_layer_blocks_of_a_piecewise_linear_network(name: str) -> None:
    model, criterion, inputs, targets = loss_of(CASES[name])
    H, G = dense.hessian(model, criterion, inputs, targets), dense.ggn(model, criterion, inputs, targets)
    close(dense.project_layer(H, model), dense.project_layer(G, model))
    assert relative(H - G, G) > 0.05


@pytest.mark.parametrize("name", ["mse", "transformer", "reused"])
def test_hessian_is_not_ggn_on_layer_blocks_of_other_networks(name: str) -> None:
    model, criterion, inputs, targets = loss_of(CASES[name])
    H, G = dense.hessian(model, criterion, inputs, targets), dense.ggn(model, criterion, inputs, targets)
    assert relative(dense.project_layer(H - G, model), G) > 0.02


def test_hessian_is_ggn_for_a_linear_model() -> None:
    close(dense.hessian(*linear_mse()), dense.ggn(*linear_mse()))


def test_softmax_null_space_ranks_symmetry_and_psd() -> None:
    model, criterion, inputs, targets = loss_of(CASES["mlp"])
    output = dense.predict(model, inputs)
    close(torch.func.hessian(lambda f: criterion(f, targets))(output).sum(3), torch.zeros(6, 3, 6).double())
    square = dense.fisher_mc(model, criterion, inputs, targets, dense.exact_cotangents(criterion, output, targets, 6))
    for M, rank in ((dense.ggn(model, criterion, inputs, targets), 12), (square, 12), (dense.empirical_fisher(*loss_of(CASES["mlp"])), 6)):
        close(M, M.T)
        assert torch.linalg.eigvalsh(M).min() > -1e-12
        assert torch.linalg.matrix_rank(M, hermitian=True, rtol=1e-10) == rank
    assert torch.linalg.matrix_rank(dense.batched_empirical_fisher(*loss_of(CASES["mlp"])), hermitian=True, rtol=1e-10) == 1
    assert torch.linalg.eigvalsh(dense.hessian(*loss_of(CASES["mlp"]))).min() < -1e-4
    assert torch.linalg.matrix_rank(dense.ggn(*loss_of(CASES["mse"])), hermitian=True, rtol=1e-10) == 12


@pytest.mark.parametrize(
    ("name", "terms", "events"), [("mlp", 6, 1), ("mse", 6, 2), ("bce", 6, 3), ("transformer", 15, 1), ("transformer_ignore", 11, 1)]
)
def test_sum_reduction_multiplies_by_the_terms_and_the_events(name: str, terms: int, events: int) -> None:
    """Curvature and gradient times N_terms K; the empirical Fisher times N_terms K^2, its batched form times (N_terms K)^2."""
    mean = CASES[name]
    criterion = type(mean.criterion)(reduction="sum")
    total = replace(mean, criterion=criterion)
    assert dense.terms(mean.criterion, dense.predict(mean.make(), mean.inputs), mean.targets) == terms
    for of in (dense.gradient, dense.hessian, dense.ggn, dense.fisher):
        close(of(*loss_of(total)), terms * events * of(*loss_of(mean)))
    close(dense.empirical_fisher(*loss_of(total)), terms * events**2 * dense.empirical_fisher(*loss_of(mean)))
    close(dense.batched_empirical_fisher(*loss_of(total)), (terms * events) ** 2 * dense.batched_empirical_fisher(*loss_of(mean)))


def test_an_unknown_criterion_and_reduction_are_refused() -> None:
    model, _, inputs, targets = loss_of(CASES["mse"])
    with pytest.raises(TypeError, match="no terms of HuberLoss"):
        dense.empirical_fisher(model, nn.HuberLoss(), inputs, targets)
    with pytest.raises(ValueError, match="reductions 'mean' and 'sum'"):
        dense.empirical_fisher(model, nn.MSELoss(reduction="none"), inputs, targets)
    with pytest.raises(ValueError, match="differ in shape"):
        dense.empirical_fisher(model, nn.MSELoss(), inputs, labels(2, 6).double())
