"""The rule for every other module: vector-Jacobian products of that one module, example by example."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from precond.errors import ObservationError
from precond.layers.base import Rule
from precond.observe import LayerColumns, Tensors, own_pass, tensors_in


def example_dim(module: nn.Module, name: str, tensor: Tensor, batch: int) -> int | None:
    """The dimension of an argument that enumerates examples; None: the same for all of them."""
    # the initial state is (layers, batch, hidden), whatever batch_first
    if isinstance(module, nn.RNNBase) and name.split(".")[0] in ("1", "hx"):
        return 1
    if isinstance(module, nn.MultiheadAttention) and name in ("attn_mask", "5"):
        return None
    dim = 0
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and not module.batch_first and name != "key_padding_mask":
        dim = 1
    return dim if tensor.dim() > dim and tensor.shape[dim] == batch else None


def _named(seen: LayerColumns) -> dict[str, Any]:
    """The arguments by position or keyword; the pair of states of an LSTM, or of its cell, as two."""
    named = {str(i): a for i, a in enumerate(seen.args)} | dict(seen.kwargs)
    for key in ("1", "hx"):
        if isinstance(seen.module, (nn.LSTM, nn.LSTMCell)) and isinstance(named.get(key), (tuple, list)):
            named |= {f"{key}.{i}": state for i, state in enumerate(named.pop(key))}
    return named


def _argument(values: Mapping[str, Any], name: str) -> Any:
    return values[name] if name in values else (values[f"{name}.0"], values[f"{name}.1"])


def output_dims(module: nn.Module, grads: Sequence[Tensor | None], batch: int) -> list[int]:
    """The dimension of each output's (K, ...) columns that enumerates examples."""
    dims = []
    for position, grad in enumerate(grads):
        dim = 0
        if isinstance(module, nn.RNNBase):
            dim = 1 if position > 0 or not module.batch_first else 0
        elif isinstance(module, nn.MultiheadAttention):
            dim = 1 if position == 0 and not module.batch_first else 0
        if grad is not None and (grad.dim() <= dim + 1 or grad.shape[dim + 1] != batch):
            raise ObservationError(
                f"an output of {type(module).__name__} has shape {tuple(grad.shape[1:])} for a batch of {batch} examples, so its gradient cannot "
                "be split by example: leave the layer out with an override of None, or give it a rule of its own."
            )
        dims.append(dim + 1)
    return dims


class Generic(Rule):
    """Runs the module again for one example at a time, under vmap where its operations allow it, else in a loop.

    So it is right for a weight that is made from other tensors, by `parametrize` or the old hooks of `weight_norm` and `spectral_norm`:
    its parameters are those tensors.
    """

    def check(self, seen: LayerColumns) -> None:
        """What enumerates examples is found argument by argument, in `gradients`."""

    def refuse(self, module: nn.Module) -> str | None:
        for name, inner in module.named_modules():
            rate = getattr(inner, "p", 0.0) if isinstance(inner, nn.modules.dropout._DropoutNd) else getattr(inner, "dropout", 0.0)
            if module.training and isinstance(rate, float) and rate > 0:
                return f"its dropout ({name or type(inner).__name__}, rate {rate}) would draw other masks when the module is run again by example"
            if isinstance(inner, nn.modules.batchnorm._BatchNorm) and (inner.training or inner.running_mean is None):
                return f"its {type(inner).__name__} {name!r} normalises by the batch, and so mixes the examples that are to be run one by one"
            if not _runs_alone(inner):
                return f"its {type(inner).__name__} {name!r} rewrites its weight or divides its gradient by counts of the batch"
        return None

    def gradients(self, seen: LayerColumns, names: Sequence[str], examples: slice) -> Tensors:
        module, batch = seen.module, seen.batch
        reason = self.refuse(module)
        if reason is not None:
            raise ObservationError(f"layer {seen.name!r} ({type(module).__name__}) has no gradient by example: {reason}.")
        named = _named(seen)
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and seen.input.dim() != 3:
            raise ObservationError(
                f"layer {seen.name!r} ({type(module).__name__}) takes packed sequences or a single one without a batch: give it a 3-dimensional "
                f"tensor (pad, or unsqueeze), or leave it out with overrides={{{seen.name!r}: None}}."
            )
        dims = {n: example_dim(module, n, a, batch) for n, a in named.items() if isinstance(a, Tensor)}
        nested = [t for n, a in named.items() if n not in dims for t in tensors_in(a)]
        mapped = {n: named[n].movedim(d, 0)[examples] for n, d in dims.items() if d is not None}
        used = [i for i, g in enumerate(seen.grads) if g is not None]
        if not mapped or nested:
            raise ObservationError(
                f"layer {seen.name!r} ({type(module).__name__}) takes no tensor with {batch} examples in front (or takes them inside a nest), so "
                "its gradient cannot be split by example: leave it out with an override of None, or give it a rule of its own."
            )
        out_dims = output_dims(module, seen.grads, batch)
        columns = [seen.grads[i].movedim(out_dims[i], 1)[:, examples] for i in used]  # type: ignore[union-attr]
        pull = _pullback(seen, names, dims, named, used)
        with own_pass(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _still(module):
            return _over_examples(pull, mapped, columns, {n: module.get_parameter(n).shape for n in names})


def _runs_alone(module: nn.Module) -> bool:
    """Whether an embedding inside gives the same gradient when it is run by example."""
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return True
    return not (module.scale_grad_by_freq or module.sparse or module.max_norm is not None)


@contextlib.contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """Run it as in the call: no power iteration of a spectral norm goes on, and a weight that an old hook left on a module is put back."""
    made = [m for p in module.modules() if isinstance(p, parametrize.ParametrizationList) for m in p.modules()]
    hooks = [(m, hook) for m in module.modules() for hook in m._forward_pre_hooks.values()]
    hooked = [(m, hook.name) for m, hook in hooks if isinstance(hook, (WeightNorm, SpectralNorm))]
    modes = [(m, m.training) for m in (*made, *(m for m, _ in hooked))]
    weights = [(m, name, m.__dict__.get(name)) for m, name in hooked]
    for m, _ in modes:
        m.training = False
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
        for m, name, weight in weights:
            m.__dict__[name] = weight


Pull = Callable[[Tensors, list[Tensor]], Tensors]


def _pullback(seen: LayerColumns, names: Sequence[str], dims: dict[str, int | None], named: dict[str, Any], used: list[int]) -> Pull:
    """(one example's inputs, one column of its output gradients) -> gradients of the parameters."""
    module = seen.module
    params = dict(module.named_parameters(remove_duplicate=False))
    held = {n: p.detach() for n, p in params.items() if n not in names}
    free = {n: params[n].detach() for n in names}
    out_dims = [d - 1 for d in output_dims(module, seen.grads, seen.batch)]

    def pull(example: Tensors, column: list[Tensor]) -> Tensors:
        full = {n: example[n].unsqueeze(d) if n in example and d is not None else named[n] for n, d in dims.items()}
        values = {**named, **full}
        args = tuple(_argument(values, str(i)) for i in range(len(seen.args)))
        kwargs = {n: _argument(values, n) for n in seen.kwargs}

        def run(free: Tensors) -> tuple[Tensor, ...]:
            outputs = list(tensors_in(torch.func.functional_call(module, {**held, **free}, args, kwargs, tie_weights=False)))
            return tuple(outputs[i] for i in used)

        back = torch.func.vjp(run, free)[1]
        cotangents = tuple(c.unsqueeze(out_dims[i]) for i, c in zip(used, column, strict=True))
        (gradients,) = back(cotangents)
        return dict(gradients)

    return pull


def _over_examples(pull: Pull, mapped: Tensors, columns: list[Tensor], shapes: Mapping[str, torch.Size]) -> Tensors:
    """Vmap over columns and examples; a module that cannot be vmapped is looped over."""
    count, examples = columns[0].shape[:2]
    try:
        by_column = torch.func.vmap(lambda e, c: pull(e, c), in_dims=(None, 0))
        out: Tensors = torch.func.vmap(by_column, in_dims=(0, 1), out_dims=1)(mapped, columns)
        # some of torch's batching rules broadcast what they should not
        if all(g.shape == (count, examples, *shapes[n]) for n, g in out.items()):
            return out
    except (RuntimeError, ValueError) as error:
        if "out of memory" in str(error):
            raise
    looped = [[pull({n: m[i] for n, m in mapped.items()}, [c[k, i] for c in columns]) for i in range(examples)] for k in range(count)]
    return {n: torch.stack([torch.stack([one[n] for one in row]) for row in looped]) for n in looped[0][0]}
