"""Powers of diag(s) + E to first order in E, without forming E.

(diag(s) + E)^-p = diag(s)^-p + L * E entry by entry, L_ij = (s_i^-p - s_j^-p) / (s_i - s_j), and -p s_i^(-p - 1) where they are equal
(Daleckii and Krein 1965; Higham 2008, theorem 3.11): no gap between eigenvalues enters. As s^-p is a mean of resolvents for 0 < p < 1,

    s^-p = sin(pi p) / pi  integral t^-p / (t + s) dt ,     L_ij = - sin(pi p) / pi  integral t^-p / ((t + s_i) (t + s_j)) dt ,

L = - U U^T with a column of U a node of a quadrature, and L * E applied to z is - sum_m u_m * E (u_m * z): products of E with a few columns.
For p = 1 there is one, u = 1 / s.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from precond.damping import Damping
from precond.numerics import ROUNDING, round_off
from precond.operators import Dense, KroneckerEigen, Operator, Shifted

PROBES = 32

Shift = Callable[[Tensor], Tensor]
"""From the eigenvalues (b, n) of a matrix to the damped ones."""


def shift_of(operator: Operator, damping: Damping, power: float) -> Shift | None:
    """What damping does to the eigenvalues of a matrix alone, where it adds a multiple of the identity and no more; else None.

    Args:
        operator: damped already, where the damping does not keep eigenvectors.

    Eigenvalues within rounding of zero are zero only where they would be so damped: a shift above that makes them harmless.
    """
    inner = operator.operator if isinstance(operator, Shifted) else operator
    if not isinstance(inner, Dense):
        return None

    def damped(d: Tensor) -> tuple[Operator, Operator]:
        before: Operator = KroneckerEigen((None,), d)
        if isinstance(operator, Shifted):
            before = Shifted(before, operator.shift).spectral()
        return before, damping(before, power) if damping.keeps_eigenvectors else before

    def shift(d: Tensor) -> Tensor:
        s, noise = damped(d)[1].spectral().spectrum, ROUNDING * torch.finfo(d.dtype).eps * d.abs().amax(-1, keepdim=True)
        return torch.where(s.abs() <= noise, damped(round_off(d))[1].spectral().spectrum, s)

    before, after = damped(torch.ones_like(inner.block_diagonals()).reshape(-1, inner.size))
    return shift if after is before or isinstance(after, Shifted) else None


def resolvents(s: Tensor, power: float, accuracy: float) -> Tensor:
    """U (b, n, m) of eigenvalues `s` (b, n), with L = -U U^T to a relative `accuracy` of at most 1e-3; 0 < power <= 1.

    The trapezoidal rule in log t, whose error falls as exp(-2 pi^2 / step); 15 to 20 nodes for 1e-3, 50 for 1e-6, and more for a
    power close to 1.

    >>> U = resolvents(torch.tensor([[1.0, 4.0]], dtype=torch.float64), 0.5, 1e-9)
    >>> (U @ U.mT)[0]
    tensor([[0.5000, 0.1667],
            [0.1667, 0.0625]], dtype=torch.float64)
    """
    if power == 1:
        return s.reciprocal().unsqueeze(-1)
    digits = -math.log(min(max(accuracy, torch.finfo(s.dtype).eps), 1e-3))
    step = 2 * math.pi**2 / (digits + 5)
    low = math.log(float(s.amin())) - (digits + 1) / (1 - power)
    high = math.log(float(s.amax())) + (digits + 1) / (1 + power)
    x = torch.arange(low, high + step, step, dtype=torch.float64, device=s.device)
    weights = step * math.sin(math.pi * power) / math.pi * ((1 - power) * x).exp()
    return weights.sqrt().to(s.dtype) / (x.exp().to(s.dtype) + s.unsqueeze(-1))


def relative_size(Q: Tensor, d: Tensor, N: Tensor, s: Tensor) -> Tensor:
    """|G|_F, (b,), of G_ij = E_ij / sqrt(|s_i s_j|) with E = Q^T N; 0 where it is no more than the rounding of N.

    Estimated from `PROBES` fixed vectors of signs z, as |G|_F^2 is the mean of |G z|^2: to a quarter at worst.

    Args:
        Q: the basis (b, n, n), with `d` (b, n) the diagonal of Q^T C Q and `N` = C Q - Q diag(d).
        s: what `d` is where damped.
    """
    n = s.shape[-1]
    signs = torch.randint(2, (n, PROBES), generator=torch.Generator().manual_seed(0)).to(s) * 2 - 1
    root = torch.where(s == 0, 1.0, s.abs()).rsqrt().unsqueeze(-1)  # a zero fails later
    size = (root * (Q.mT @ (N @ (root * signs)))).square().sum(-2).mean(-1).sqrt()
    noise = 4 * torch.finfo(s.dtype).eps * d.abs().amax(-1) * root.square().sum((-2, -1)) / math.sqrt(n)
    return torch.where(size <= noise, 0.0, size)
