"""Claims against ASDL 0.1a5 (`asdfghjkl`, MIT), in float64 to 1e-10.

- Its Fisher matrices are ours, exact, empirical and of drawn labels: of the model, by layers, by units, by elements; of Linear, Conv2d and norms. Its
  normal has variance 1 where a mean squared error over K outputs stands for K / 2. Without biases its K-FAC is ours too, by expansion, and so
  is the empirical EK-FAC of Linear layers with no fewer examples than inputs. Its Hessian is ours, of the model, by layers and by elements.
- So are directions: the natural gradient of the model, by units and by elements; K-FAC, and with its empirical rows SKFAC, with the damping split by pi
  and, but for K-FAC, with averages; SMW-NG of Linear layers; Newton's, with the Hessian and its absolute value; SENG's of one example; Shampoo's steps, its
  coupled Newton iteration run to rounding (it stops at 1e-6) and undamped, as it adds its damping to the sums themselves.

What is wrong there is not matched, and shown to differ: of several draws the matrix is their number too small; K-FAC leaves biases to B alone; the
eigenbasis is not turned back, so that EK-FAC's direction is another (its matrix is right); the BFGS update changes a copy; normalised inputs are recovered by a
division by the scale, which may be 0; the Gram matrix of a convolution is a product of two, which is exact without shared positions only;
SENG's released combination of several examples. CurveBall and the layer-wise direction do not run. `ema_decay` is the weight of the new value, and
averages start at 0 without correction, for K-FAC in both factors, so that their
product is (1 - b^t)^2 of its own, where ours is 1 - b^t. Not compared: LayerNorm at several positions, which it takes for examples; PSGD, an older generation;
K-BFGS, which stands on the BFGS update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import asdl
import pytest
import torch
from asdl.fisher import FisherConfig, get_fisher_maker
from asdl.hessian import HessianConfig, HessianMaker
from asdl.precondition import kbfgs, shampoo
from torch import Tensor, nn

import precond
from nets import labels, normal, seeded
from oracles.peers import close, in_double
from precond import solvers
from precond.history import Ema, Sum
from precond.matrices import FisherMC

pytestmark = pytest.mark.filterwarnings("ignore")
RATE = 0.1


@pytest.fixture(autouse=True)
def no_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It marks ranges for a CUDA profiler, which a CPU build of torch refuses."""
    for name in ("range_push", "range_pop"):
        monkeypatch.setattr(torch.cuda.nvtx, name, lambda *message: 0)


def _mlp(*, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5, bias), nn.Tanh(), nn.Linear(5, 4, bias), nn.Tanh(), nn.Linear(4, 3, bias))


def _conv(*, bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2, bias=bias), nn.Tanh(), nn.Conv2d(3, 2, 2, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3, bias)
    )


def _norms() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).eval()


def _square() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))


IMAGES, ROWS = (normal(4, 2, 6, 6), labels(3, 4)), (normal(6, 4), labels(3, 6))
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]] = {
    "mlp": (_mlp, *ROWS),
    "mlp-no-bias": (lambda: _mlp(bias=False), *ROWS),
    "wide": (lambda: _mlp(bias=False), normal(3, 4), labels(3, 3)),
    "one": (lambda: _mlp(bias=False), normal(1, 4), labels(3, 1)),
    "two": (lambda: _mlp(bias=False), normal(2, 4), labels(3, 2)),
    "conv": (_conv, *IMAGES),
    "conv-no-bias": (lambda: _conv(bias=False), *IMAGES),
    "norms": (_norms, *ROWS),
    "no-scale": (_norms, *ROWS),
    "square": (_square, normal(8, 3), labels(3, 8)),
}
KINDS = {"fisher": "fisher_exact", "empirical_fisher": "fisher_emp", "fisher_mc": "fisher_mc"}
SHAPES = {"full": "full", "layer": "layer_wise", "unit": "unit_wise", "diagonal": "diag", "kron_io": "kron", "kron_eigen": "kfe"}


def made(name: str) -> nn.Module:
    model = seeded(NETS[name][0])
    if name == "no-scale":
        nn.init.zeros_(model[1].weight)
    return model


def called(maker: Any, model: nn.Module, inputs: Tensor, targets: Tensor, criterion: nn.Module) -> None:
    maker.setup_loss_call(criterion, maker.setup_model_call(model, inputs), targets)
    maker.forward_and_backward()


# -- matrices ------------------------------------------------------------------------------------------------------------


def dense_of(matrix: Any, repr: str) -> Tensor:
    """One of its matrices; without biases in the last two forms."""
    if repr == "unit":
        return torch.block_diag(*matrix.unit.data.flatten(end_dim=-3))
    if repr == "diagonal":
        return torch.cat([part.flatten() for part in matrix.diag.data if part is not None]).diag()
    if repr == "kron_io":
        return torch.kron(matrix.kron.B, matrix.kron.A)
    if repr == "kron_eigen":
        U = torch.kron(matrix.kfe.Ub, matrix.kfe.Ua)
        return (U * matrix.kfe.scale[0].flatten()) @ U.T
    whole: Tensor = matrix.data
    return whole


def by_unit(model: nn.Module) -> Tensor:
    """Positions in the order of the parameters of what it has unit by unit, [w_o, b_o]."""
    found, at = [], 0
    for module in model.modules():
        sizes = [p.numel() for p in module.parameters(recurse=False)]
        if sizes:
            units = len(next(module.parameters(recurse=False)))
            pieces = [torch.arange(at + sum(sizes[:i]), at + sum(sizes[: i + 1])).view(units, -1) for i in range(len(sizes))]
            found.append(torch.cat(pieces, 1).flatten())
            at += sum(sizes)
    return torch.cat(found)


def their_fisher(name: str, matrix: str, repr: str, criterion: nn.Module, targets: Tensor, **options: Any) -> Tensor:
    model, inputs = made(name), NETS[name][1]
    loss = "mse" if isinstance(criterion, nn.MSELoss) else "cross_entropy"
    config = FisherConfig(fisher_type=KINDS[matrix], fisher_shapes=[SHAPES[repr]], loss_type=loss, data_size=len(inputs), **options)
    with in_double():
        called(get_fisher_maker(model, config), model, inputs, targets, criterion)
    if repr == "full":
        return dense_of(model.fisher, repr)
    M = torch.block_diag(*[dense_of(module.fisher, repr) for module in model.modules() if hasattr(module, "fisher")])
    if repr == "unit":
        order = by_unit(model).argsort()
        M = M[order][:, order]
    return M


def our_matrix(name: str, criterion: nn.Module | None = None, targets: Tensor | None = None, **options: Any) -> Tensor:
    _, inputs, classes = NETS[name]
    found = precond.curvature(made(name), criterion or nn.CrossEntropyLoss(), inputs, classes if targets is None else targets, **options)
    return found.to_dense()


CELLS = [(name, repr) for name in ("mlp", "mlp-no-bias", "conv", "conv-no-bias", "norms") for repr in ("full", "layer", "unit", "diagonal")]
CELLS += [(name, "kron_io") for name in ("mlp-no-bias", "wide", "conv-no-bias")]


@pytest.mark.parametrize("matrix", ["fisher", "empirical_fisher"])
@pytest.mark.parametrize(("name", "repr"), CELLS)
def test_fisher_matrices(name: str, repr: str, matrix: str) -> None:
    theirs = their_fisher(name, matrix, repr, nn.CrossEntropyLoss(), NETS[name][2])
    close(our_matrix(name, matrix=matrix, repr=repr), theirs)


def test_the_empirical_eigenbasis() -> None:
    for name in ("mlp-no-bias", "square"):
        theirs = their_fisher(name, "empirical_fisher", "kron_eigen", nn.CrossEntropyLoss(), NETS[name][2])
        close(our_matrix(name, matrix="empirical_fisher", repr="kron_eigen"), theirs)


@pytest.mark.parametrize("repr", ["full", "layer", "diagonal"])
def test_a_normal_of_variance_1(repr: str) -> None:
    targets = normal(6, 3, seed=5)
    theirs = their_fisher("mlp", "fisher", repr, nn.MSELoss(), targets)
    ours = our_matrix("mlp", nn.MSELoss(), targets, matrix="fisher", repr=repr)
    close(3 / 2 * ours, theirs)
    assert (ours - theirs).norm() > 0.1 * ours.norm()  # negative


@pytest.fixture
def same_labels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The labels that we draw, handed to its sampler."""
    drawn: list[Tensor] = []
    original: Callable[..., Tensor] = FisherMC.cotangents

    def noted(self: Any, context: Any) -> Tensor:
        cotangents = original(self, context)
        drawn.extend(cotangents.argmin(2))
        return cotangents

    waiting: list[Tensor] = []

    def sample(self: Any) -> Tensor:
        if not waiting:
            waiting.extend(drawn)
        return waiting.pop(0)

    monkeypatch.setattr(FisherMC, "cotangents", noted)
    monkeypatch.setattr(torch.distributions.Categorical, "sample", sample)
    yield drawn


@pytest.mark.parametrize(("name", "repr"), [("mlp", "full"), ("conv", "layer"), ("conv-no-bias", "kron_io"), ("norms", "unit"), ("mlp", "diagonal")])
def test_drawn_labels(name: str, repr: str, same_labels: list[Tensor]) -> None:
    ours = our_matrix(name, matrix="fisher_mc", repr=repr, seed=3)
    assert len(same_labels) == 1
    assert not torch.equal(same_labels[0], NETS[name][2])
    close(ours, their_fisher(name, "fisher_mc", repr, nn.CrossEntropyLoss(), NETS[name][2]))


def test_of_several_draws_its_matrix_is_their_number_too_small(same_labels: list[Tensor]) -> None:
    ours = our_matrix("mlp", matrix=FisherMC(samples=3), repr="full", seed=3)
    assert len(same_labels) == 3
    theirs = their_fisher("mlp", "fisher_mc", "full", nn.CrossEntropyLoss(), NETS["mlp"][2], n_mc_samples=3)
    close(ours, 3 * theirs)


@pytest.mark.parametrize("name", ["mlp", "conv", "norms"])
def test_the_hessian(name: str) -> None:
    _, inputs, targets = NETS[name]
    for repr in ("full", "layer", "diagonal"):
        model = made(name)
        with in_double():
            called(HessianMaker(model, HessianConfig(hessian_shapes=[SHAPES[repr]])), model, inputs, targets, nn.CrossEntropyLoss())
        found = [model.hessian] if repr == "full" else [module.hessian for module in model.modules() if hasattr(module, "hessian")]
        close(our_matrix(name, matrix="hessian", repr=repr), torch.block_diag(*[dense_of(matrix, repr) for matrix in found]))


# -- directions ----------------------------------------------------------------------------------------------------------


def walked(name: str, model: nn.Module, backward: Callable[[Tensor, Tensor], None], optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    """(steps, P): where SGD is after every step, on batches that differ."""
    _, inputs, targets = NETS[name]
    path = []
    for step in range(steps):
        optimizer.zero_grad()
        backward((1 + 0.1 * step) * inputs, targets.roll(step))
        optimizer.step()
        path.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return torch.stack(path)


def theirs(name: str, maker: str, config: Any = None, *, steps: int = 3, damping: float = 0.05, **options: Any) -> Tensor:
    model, criterion = made(name), nn.CrossEntropyLoss()
    if config is None:
        config = asdl.PreconditioningConfig(data_size=len(NETS[name][1]), damping=damping)
    with in_double():
        grad_maker = getattr(asdl, maker)(model, config, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        return walked(name, model, lambda x, y: called(grad_maker, model, x, y, criterion), optimizer, steps)


def ours(name: str, *, steps: int = 3, **options: Any) -> Tensor:
    model, criterion = made(name), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with precond.Preconditioner(**{"damping": 0.05, **options}).attach(model, criterion, optimizer):
        return walked(name, model, lambda x, y: criterion(model(x), y).backward(), optimizer, steps)


@pytest.mark.parametrize("matrix", ["fisher", "empirical_fisher"])
@pytest.mark.parametrize(
    ("name", "maker", "repr", "solver"),
    [
        ("mlp", "FullNaturalGradientMaker", "full", "cholesky"),
        ("conv", "FullNaturalGradientMaker", "full", "cholesky"),
        ("norms", "FullNaturalGradientMaker", "full", "cholesky"),
        ("mlp", "UnitWiseNaturalGradientMaker", "unit", "cholesky"),
        ("norms", "UnitWiseNaturalGradientMaker", "unit", "cholesky"),
        ("mlp", "DiagNaturalGradientMaker", "diagonal", "elementwise"),
        ("conv", "DiagNaturalGradientMaker", "diagonal", "elementwise"),
        ("mlp-no-bias", "KfacGradientMaker", "kron_io", "cholesky"),
        ("conv-no-bias", "KfacGradientMaker", "kron_io", "cholesky"),
    ],
)
def test_natural_gradients(name: str, maker: str, repr: str, solver: str, matrix: str) -> None:
    close(ours(name, matrix=matrix, repr=repr, solver=solver), theirs(name, maker, fisher_type=KINDS[matrix]))


def test_skfac() -> None:
    repr = precond.representations.get("kron_io")(input="rows", output="rows")
    for name in ("wide", "mlp-no-bias"):
        path = ours(name, matrix="empirical_fisher", repr=repr, solver="smw")
        close(path, theirs(name, "KfacGradientMaker", fisher_type="fisher_emp", swift=True))
        close(path, ours(name, matrix="empirical_fisher", repr="kron_io", solver="cholesky"))


@pytest.mark.parametrize(
    ("maker", "repr", "solver"), [("FullNaturalGradientMaker", "full", "cholesky"), ("DiagNaturalGradientMaker", "diagonal", "elementwise")]
)
def test_averages_start_at_zero_and_decay_is_the_weight_of_the_new(maker: str, repr: str, solver: str) -> None:
    def average(decay: float) -> Tensor:
        config = asdl.PreconditioningConfig(data_size=len(ROWS[0]), damping=0.05, ema_decay=decay)
        return theirs("mlp", maker, config, fisher_type="fisher_emp", steps=5)

    path = ours("mlp", matrix="empirical_fisher", repr=repr, solver=solver, history=Ema(0.7, debias=False), steps=5)
    close(path, average(0.3))
    assert (path - average(0.7)).abs().max() > 1e-4


def test_smw_of_linear_layers() -> None:
    for name in ("mlp", "wide"):
        config = asdl.SmwEmpNaturalGradientConfig(data_size=len(NETS[name][1]), damping=0.5)
        close(ours(name, matrix="empirical_fisher", repr="full_gram", solver="smw", damping=0.5), theirs(name, "SmwEmpNaturalGradientMaker", config))


def test_newton() -> None:
    for name in ("mlp", "conv", "norms"):
        for matrix, solver, absolute in (("hessian", "lu", False), ("abs_hessian", "cholesky", True)):
            config = asdl.NewtonGradientConfig(damping=2.0, absolute=absolute)
            close(ours(name, matrix=matrix, repr="full", solver=solver, damping=2.0), theirs(name, "NewtonGradientMaker", config))


def test_shampoo(monkeypatch: pytest.MonkeyPatch) -> None:
    original = shampoo.ComputePower
    monkeypatch.setattr(shampoo, "ComputePower", lambda F, p, ridge_epsilon: original(F, p, error_tolerance=1e-13, ridge_epsilon=ridge_epsilon))
    options: dict[str, Any] = {"matrix": "batched_empirical_fisher", "repr": "kron_dim", "damping": 0.0, "history": Sum(initial=1e-12)}
    path = theirs("square", "ShampooGradientMaker", damping=0.0)
    close(ours("square", solver=solvers.Eigen(power=0.5), **options), path)
    assert (ours("square", solver=solvers.Eigen(power=0.25), **options) - path).abs().max() > 1e-3


def test_seng_of_one_example_and_not_of_several() -> None:
    for name, same in (("one", True), ("two", False)):
        path = ours(name, matrix="empirical_fisher", repr="layer_gram", solver="smw", damping=0.5)
        other = theirs(name, "SengGradientMaker", damping=0.5)
        assert torch.allclose(path, other, rtol=1e-10, atol=1e-12) == same


# -- what is wrong there -------------------------------------------------------------------------------------------------


def test_kfac_leaves_biases_to_the_output_factor() -> None:
    path = ours("mlp", matrix="fisher", repr="kron_io", solver="cholesky", steps=1)
    assert (path - theirs("mlp", "KfacGradientMaker", fisher_type="fisher_exact", steps=1)).abs().max() > 1e-2


def test_the_eigenbasis_is_not_turned_back() -> None:
    path = ours("mlp-no-bias", matrix="empirical_fisher", repr="kron_eigen", solver="elementwise", damping=1e-7, steps=1)
    assert (path - theirs("mlp-no-bias", "EkfacGradientMaker", fisher_type="fisher_emp", damping=1e-7, steps=1)).abs().max() > 1e-2


def test_the_bfgs_update_changes_a_copy() -> None:
    H = torch.eye(3, dtype=torch.float64)
    kbfgs.bfgs_inv_update_(H, normal(3), normal(3, seed=1))
    assert torch.equal(H, torch.eye(3, dtype=torch.float64))


def test_normalised_inputs_are_lost_where_the_scale_is_zero() -> None:
    assert our_matrix("no-scale", matrix="empirical_fisher", repr="layer").isfinite().all()
    assert not their_fisher("no-scale", "empirical_fisher", "layer", nn.CrossEntropyLoss(), ROWS[1]).isfinite().all()


def test_the_gram_matrix_of_a_convolution_is_a_product_of_two() -> None:
    config = asdl.SmwEmpNaturalGradientConfig(data_size=4, damping=0.5)
    path = ours("conv-no-bias", matrix="empirical_fisher", repr="full_gram", solver="smw", damping=0.5, steps=1)
    assert (path - theirs("conv-no-bias", "SmwEmpNaturalGradientMaker", config, steps=1)).abs().max() > 1e-4


def test_two_of_its_directions_do_not_run() -> None:
    with pytest.raises(AttributeError, match="has_inv"):
        theirs("mlp", "LayerWiseNaturalGradientMaker", fisher_type="fisher_exact")
    with pytest.raises(NotImplementedError):
        theirs("mlp", "CurveBallGradientMaker", asdl.CurveBallGradientConfig(data_size=6))
