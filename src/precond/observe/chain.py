"""A sequential model as a chain of linear and element-wise links."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from precond.errors import ObservationError
from precond.observe.guard import own_pass
from precond.observe.names import canonical
from precond.observe.observation import Tensors

_WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LINEAR = (
    *_WEIGHTS, nn.Identity, nn.Flatten, nn.Dropout, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid, nn.Tanh,
    nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Threshold,
)  # fmt: skip


@dataclass(frozen=True)
class Link:
    """One module of the chain. shape: of one example at its input."""

    name: str
    module: nn.Module
    shape: tuple[int, ...] = ()

    @property
    def elementwise(self) -> bool:
        return isinstance(self.module, _ELEMENTWISE)

    def __call__(self, x: Tensor) -> Tensor:
        """The module on (m, *shape) in the precision of `x`, without anybody's hooks."""
        weights = {f"module.{n}": p.detach().to(x.dtype) for n, p in self.module.named_parameters()}
        found: Tensor = torch.func.functional_call(_Bare(self.module), weights, (x,))
        return found

    def pull(self, moment: Tensor) -> Tensor:
        """J^T G J for a linear link: G (*out, *out) at its output to (*shape, *shape) at its input, by two batched passes."""
        ends = moment.shape[: moment.dim() // 2]
        half = self._transposed(moment.reshape(-1, *ends))  # G J: the rows of G, each sent back
        return self._transposed(half.flatten(1).T.reshape(-1, *ends)).reshape(*self.shape, *self.shape)

    def _transposed(self, cotangents: Tensor) -> Tensor:
        with own_pass(), torch.enable_grad():
            x = cotangents.new_zeros(len(cotangents), *self.shape, requires_grad=True)
            (found,) = torch.autograd.grad(self(x), x, cotangents)
        return found


class _Bare(nn.Module):
    """A module's forward alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module.forward(x)


@dataclass(frozen=True)
class ChainSums:
    """What adds over criterion calls, each sum over examples and unscaled.

    links: from the first to the last layer that is observed. output: sum over columns of g g^T at the output of the last, as
    (*out, *out). slopes: for every element-wise link the sum of phi'(h) phi'(h)^T, (*shape, *shape).
    """

    links: tuple[Link, ...]
    output: Tensor
    slopes: Tensors


def chain_of(model: nn.Module) -> tuple[Link, ...]:
    """The modules of a sequential model in order; raises `ObservationError` naming the first that is no link."""
    links = tuple(_links(model, ""))
    seen: dict[int, str] = {}
    for link in links:
        for p in link.module.parameters():
            if id(p) in seen:
                raise _refuse(link.name, link.module, f"its weights are those of {seen[id(p)]!r} as well")
        seen |= {id(p): link.name for p in link.module.parameters()}
    return links


def why_no_chain(model: nn.Module) -> str | None:
    """A sentence that names the first module that is no link, or None."""
    try:
        chain_of(model)
    except ObservationError as error:
        return str(error)
    return None


def _links(module: nn.Module, name: str) -> Iterator[Link]:
    if _runs(module, nn.Sequential):
        for child, inner in module._modules.items():  # one that is there twice is two links
            assert inner is not None
            yield from _links(inner, f"{name}.{child}" if name else child)
        return
    name = canonical(name)
    kind = next((kind for kind in (*_LINEAR, *_ELEMENTWISE) if _runs(module, kind)), None)
    if kind is None or parametrize.is_parametrized(module):
        raise _refuse(name, module, "it is neither element-wise nor one of the linear layers that are known")
    if isinstance(module, nn.Dropout) and module.training and module.p > 0:
        raise _refuse(name, module, "it draws a mask of its own for every example; in eval() or with p=0 it is the identity")
    if isinstance(module, nn.Flatten) and module.start_dim < 1:
        raise _refuse(name, module, "its start_dim is not behind the examples")
    yield Link(name, module)


def _runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of a kind and still runs its forward."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _refuse(name: str, module: nn.Module, reason: str) -> ObservationError:
    where = f"module {name!r} ({type(module).__name__})" if name else f"the model (a {type(module).__name__})"
    return ObservationError(
        f"{where} is no link of a chain of Linear, convolution and element-wise layers in nn.Sequential, along which a batch-averaged "
        f"curvature is passed: {reason}; use the matrix 'ggn'."
    )
