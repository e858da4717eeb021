"""Identity 17, last part, and 26 across representations, float64 at 1e-10, each with a case in which it does not hold.

- The nearest Kronecker product of a block (Van Loan and Pitsianis: the first singular pair of its rearrangement) is nearer than that of every
  representation, K-FAC's among them, and is K-FAC's where that is exact.
- Powers of held matrices: -1/2 twice is -1 and -1/4 four times is -1, for K-FAC, EK-FAC and the dimensions of a tensor; the power of
  Shampoo's product is that of each factor; two of another power are not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense
import precond
from nets import CASES, normal, seeded
from precond.operators import Kronecker
from precond.representations import KronDim, KronIO

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def rearranged(F: Tensor, out: int, width: int) -> Tensor:
    """(out^2, width^2): B (x) A becomes vec(B) vec(A)^T."""
    return F.view(out, width, out, width).permute(0, 2, 1, 3).reshape(out**2, width**2)


def nearest(F: Tensor, out: int, width: int) -> Tensor:
    """B (x) A that is nearest to F in the Frobenius norm."""
    U, s, V = torch.linalg.svd(rearranged(F, out, width), full_matrices=False)
    return torch.kron((s[0] * U[:, 0]).view(out, out), V[0].view(width, width))


FORMS: list[Any] = [KronIO(), KronIO(sharing="reduce"), KronIO(input="diagonal"), KronDim(normalisation="trace"), KronDim()]


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("repr", FORMS, ids=lambda repr: f"{repr.name}-{FORMS.index(repr)}")
def test_17_no_kronecker_product_is_nearer_than_van_loans(repr: Any, matrix: str) -> None:
    case = CASES["mlp"]
    data = (case.make(), case.criterion, case.inputs, case.targets)
    exact = precond.curvature(*data, matrix=matrix, repr="layer").to_dense()
    held, ratios = precond.curvature(*data, matrix=matrix, repr=repr), []
    for name, block in held.blocks.items():
        if not isinstance(block, Kronecker) or len(block.sizes) != 2:
            continue
        where = held.positions[name]
        F, best = exact[where][:, where], nearest(exact[where][:, where], *block.sizes)
        ours, least = (block.to_dense() - F).norm(), (best - F).norm()
        close(least.square(), torch.linalg.svdvals(rearranged(F, *block.sizes))[1:].square().sum())
        assert least <= ours
        assert least < (best + 1e-3 * torch.kron(*(normal(n, n, seed=3) for n in block.sizes)) - F).norm()
        ratios.append(float(ours / least))
    assert ratios and max(ratios) > 1.01, "negative control: K-FAC and the others are not the nearest"


def test_17_van_loans_product_is_kfacs_where_kfac_is_exact() -> None:
    model, x, y = seeded(lambda: nn.Linear(4, 3)), normal(6, 4), normal(6, 3, seed=1)
    exact = precond.curvature(model, nn.MSELoss(), x, y, matrix="ggn", repr="layer").to_dense()
    held = precond.curvature(model, nn.MSELoss(), x, y, matrix="ggn", repr="kron_io")
    where = dense.joint_indices(model, "")
    close(nearest(exact[where][:, where], 3, 5), next(iter(held.blocks.values())).to_dense())


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher", "batched_empirical_fisher"])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_20_the_factors_of_a_tensor_have_the_trace_of_its_block(name: str, matrix: str) -> None:
    """And so has the product that is divided by it; that of roots has it where the block is a Kronecker product alone."""
    case, apart = CASES[name], []
    data = (case.make(), case.criterion, case.inputs, case.targets)
    diagonal = precond.curvature(*data, matrix=matrix, repr="diagonal")
    held, divided = (precond.curvature(*data, matrix=matrix, repr=KronDim(normalisation=n)) for n in ("geometric", "trace"))
    for parameter, block in held.blocks.items():
        trace = diagonal.blocks[parameter].trace()
        for factor in block.factors:
            close(factor.trace(), trace)
        close(divided.blocks[parameter].trace(), trace)
        apart.append(float(block.trace() / trace))
    assert max(apart) > 1.01, "negative control"


@pytest.mark.parametrize("repr", ["kron_io", "kron_eigen", "kron_dim", KronDim(normalisation="trace"), "unit", "full_gram", "diagonal"], ids=str)
def test_26_powers_of_a_held_matrix_compose(repr: Any) -> None:
    case = CASES["mlp"]
    C = precond.curvature(case.make(), case.criterion, case.inputs, case.targets, matrix="empirical_fisher", repr=repr)
    one, half, quarter = (precond.inverse(C, solver="eigen", damping=0.1, power=p) for p in (1.0, 0.5, 0.25))
    v = normal(C.shape[0], seed=5)
    close(half @ (half @ v), one @ v)
    close(quarter @ (quarter @ (quarter @ (quarter @ v))), one @ v)
    assert (quarter @ (quarter @ v) - one @ v).norm() > 1e-3 * (one @ v).norm()


def test_26_shampoos_power_is_that_of_each_factor() -> None:
    """-1/2 of L^(1/2) (x) R^(1/2) is -1/4 of each; of the plain product it is not."""
    model, x, y = seeded(lambda: nn.Linear(4, 3, bias=False)), normal(6, 4), normal(6, 3)
    C = precond.curvature(model, nn.MSELoss(), x, y, matrix="empirical_fisher", repr="kron_dim")
    L, R = (F.to_dense() for F in C.blocks["weight"].factors)
    G = normal(3, 4, seed=2)

    def power(M: Tensor, p: float) -> Tensor:
        d, U = torch.linalg.eigh(M)
        return (U * d**p) @ U.T

    def apply(form: Any) -> Tensor:
        held = precond.curvature(model, nn.MSELoss(), x, y, matrix="empirical_fisher", repr=form)
        return precond.inverse(held, solver="eigen", damping=0.0, power=0.5) @ G.flatten()

    assert torch.linalg.eigvalsh(L)[0] > 1e-3 and torch.linalg.eigvalsh(R)[0] > 1e-3
    want = (power(L, -0.25) @ G @ power(R, -0.25)).flatten()
    close(apply("kron_dim"), want)
    assert (apply(KronDim(normalisation="trace")) - want).norm() > 1e-2 * want.norm()
