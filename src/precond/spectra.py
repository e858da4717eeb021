"""Eigenvalues and condition numbers, of any operator or block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from precond.errors import InvalidCombination, UsageError
from precond.lanczos import tridiagonalise
from precond.numerics import eigh
from precond.operators import BlockDiagonal, LowRankEigen, Operator, Repeated, Spectral

if TYPE_CHECKING:
    from precond.preconditioner import Preconditioner

_DENSE = 2048  # rows up to which an operator without an eigendecomposition of its parts is formed


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a symmetric operator, ascending, and how many each stands for.

    values, counts: (k,); the counts are whole numbers where `exact`, and sum to n. Without `exact`, the values at the two ends lie within
    the spectrum, so that the condition number is a lower bound.
    """

    values: Tensor
    counts: Tensor
    exact: bool

    @property
    def condition(self) -> float:
        """The largest |lambda| over the smallest, infinite where an eigenvalue is zero."""
        sizes = self.values.abs()
        return float(sizes.max() / sizes.min())

    @property
    def negative(self) -> float:
        """How many eigenvalues are negative."""
        return float(self.counts[self.values < 0].sum())

    def trace(self) -> Tensor:
        """The sum of the eigenvalues, 0-dim."""
        return (self.values * self.counts.to(self.values.dtype)).sum()

    def plot(self, path: str | Path) -> Path:
        """Draw |lambda| against its rank, on a logarithmic scale, into a file; needs matplotlib.

        Raises:
            MissingPackage: matplotlib is not installed.
        """
        from precond.compare.extras import need

        need("matplotlib", package="matplotlib", purpose="to draw a spectrum")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.6, 3.8), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        order = self.values.abs().argsort(descending=True)
        values, ranks = self.values[order].double().cpu(), self.counts[order].double().cpu().cumsum(0)
        for mask, label, colour in ((values > 0, "positive", "#0072B2"), (values < 0, "negative", "#D55E00")):
            if bool(mask.any()):
                axes.plot(ranks[mask].numpy(), values[mask].abs().numpy(), ".", label=label, color=colour)
        axes.set(
            yscale="log",
            xlabel="rank",
            ylabel="|eigenvalue|",
            title=f"condition number {self.condition:.2e}{'' if self.exact else ' or more'}",
        )
        if bool((values != 0).any()):
            axes.legend(frameon=False)
        figure.savefig(path)
        return Path(path)


def spectrum(
    what: Operator | Preconditioner, block: str | None = None, *, damped: bool = False, probes: int = 8, steps: int = 32, seed: int = 0
) -> Spectrum:
    """The spectrum of an operator, or of what a preconditioner holds for a block.

    Exact, from the parts of the operator (factors, rows) where it has an eigendecomposition of them; of up to 2,048 rows by forming it.
    Otherwise, and of matrix-free operators always, by stochastic Lanczos quadrature: `probes` random signs, `steps` products each; a node
    stands for n / probes times its weight (Ubaru, Chen and Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature").

    Args:
        block: the name of a block, as in `preconditioner.operators`; may be left out where there is one.
        damped: with the damping of the block's last refresh.
        seed: of the probes.

    Raises:
        UsageError: no such block, or it holds no operator: nothing was observed, or it is matrix-free and lives within a step only.

    >>> from precond.operators import Kronecker
    >>> S = spectrum(Kronecker(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])))
    >>> S.values, round(S.condition, 3)
    (tensor([ 3.,  5.,  6., 10.]), 3.333)
    """
    if probes < 1 or steps < 1:
        raise ValueError(f"spectrum needs at least one probe and one step, not {probes} and {steps}.")
    if isinstance(what, Operator):
        if block is not None or damped:
            raise UsageError(
                "spectrum(operator) takes no block and no damping: give it the block's operator, or precond.inverse(...).damped."
            )
        operator = what
    else:
        operator = what.operator(block, damped=damped)
    generator = torch.Generator().manual_seed(seed)
    values, counts, exact = _spectrum(operator, probes, steps, generator)
    order = values.argsort()
    return Spectrum(values[order], counts[order], exact)


def _spectrum(operator: Operator, probes: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor, bool]:
    if isinstance(operator, BlockDiagonal):
        parts = [_spectrum(inner, probes, steps, generator) for inner in operator.blocks.values()]
        values, counts, exact = (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), all(p[2] for p in parts))
        left = operator.n - sum(inner.n for inner in operator.blocks.values())
        if left:
            values, counts = torch.cat([values, values.new_zeros(1)]), torch.cat([counts, counts.new_full((1,), left)])
        return values, counts, exact
    if isinstance(operator, Repeated):
        values, counts, exact = _spectrum(operator.operator, probes, steps, generator)
        return values, counts * operator.count, exact
    if operator.live:
        return _quadrature(operator, probes, steps, generator)
    try:
        return _known(operator.spectral())
    except InvalidCombination:
        if operator.n > _DENSE:
            return _quadrature(operator, probes, steps, generator)
    values = eigh(operator.to_dense())[0]
    return values, torch.ones_like(values, dtype=torch.float64), True


def _known(spectral: Spectral) -> tuple[Tensor, Tensor, bool]:
    values = spectral.spectrum.reshape(-1)
    counts = torch.ones_like(values, dtype=torch.float64)
    if isinstance(spectral, LowRankEigen) and len(values) > spectral.values.numel():
        counts[-1] = spectral.n - spectral.values.numel()  # everything orthogonal to the rows
    return values, counts, True


def _quadrature(operator: Operator, probes: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor, bool]:
    values, counts = [], []
    for _ in range(probes):
        signs = torch.randint(2, (operator.n,), generator=generator).to(dtype=operator.dtype, device=operator.device) * 2 - 1
        nodes, vectors = eigh(tridiagonalise(operator.__matmul__, signs, steps).dense)
        values.append(nodes)
        counts.append(vectors[0].to(torch.float64).square() * (operator.n / probes))
    return torch.cat(values), torch.cat(counts), False
