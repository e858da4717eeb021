"""What `precond.curvature` must be for each cell matrix x representation, from the dense oracle alone.

Claims:

* `MATRICES` and `REPRESENTATIONS` have one entry for each member that has an oracle; a member without one has no expected value, and the
  tests that walk the registries fail on it;
* `whole` is the (P, P) matrix of a case; `sampled` cotangents, where there are any, come from outside;
* `columns` are the rows u_ik of a matrix made of columns, those of one example each, with the factor that multiplies sum u u^T. With
  BatchNorm in training mode they are those of ONE backward pass over the batch (rule 8), written here with hooks and plain autograd:
  row i is (g_i a_i^T, g_i) at a Linear and (g_i xhat_i, g_i) at a BatchNorm, where g_i holds cross-example terms;
* the blocks of `kron_io` that are no Kronecker product are what the design says: norms by unit; recurrent modules, the bias of a
  transposed convolution, and a weight tied between layers of different kinds, by element. Packed attention has those of the Linear
  layers it stands for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

import dense
import dense_attention
import dense_derived
import dense_eigen
import dense_kron
import dense_recursive
import dense_sparse
from nets import CASES, SHRUNK, Case, labels, seeded


def _embedder() -> nn.Module:
    return nn.Sequential(nn.Embedding(6, 3, padding_idx=0), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))


EMBEDDER = Case("embedder", lambda: seeded(_embedder), nn.CrossEntropyLoss(), labels(6, 4, 4, seed=6), labels(3, 4))


def _frozen() -> nn.Module:
    """A bias beside a frozen weight, a weight beside a frozen bias, and a frozen norm."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.LayerNorm(5), nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    for parameter in (model[0].weight, *model[2].parameters(), model[3].bias, model[4].bias):
        parameter.requires_grad_(False)
    return model


FROZEN = Case("frozen", lambda: seeded(_frozen), nn.CrossEntropyLoss(), CASES["mlp"].inputs, CASES["mlp"].targets)
ALL = {**CASES, EMBEDDER.name: EMBEDDER, FROZEN.name: FROZEN}
EVERY = {**ALL, **SHRUNK}

MATRICES: dict[str, Callable[..., Tensor]] = {
    "hessian": dense.hessian,
    "ggn": dense.ggn,
    "fisher": dense.fisher,
    "fisher_mc": dense.fisher_mc,
    "empirical_fisher": dense.empirical_fisher,
    "batched_empirical_fisher": dense.batched_empirical_fisher,
    "abs_hessian": dense_derived.abs_hessian,
    "gradient_covariance": dense_derived.gradient_covariance,
    "batched_fisher_mc": dense_derived.batched_fisher_mc,
    "input_second_moment": dense_derived.input_second_moment,
    "ggn_recursive": dense_recursive.ggn_recursive,
}
NO_COLUMNS = ("hessian", "abs_hessian", "batched_empirical_fisher", "batched_fisher_mc", "input_second_moment", "ggn_recursive")


def _data(case: Case) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    return case.make(), case.criterion, case.inputs, case.targets


@functools.cache
def _fixed(name: str, matrix: str) -> Tensor:
    return MATRICES[matrix](*_data(EVERY[name]))


def whole(case: Case, matrix: str, sampled: Tensor | None = None) -> Tensor:
    """The (P, P) matrix."""
    return _fixed(case.name, matrix) if sampled is None else MATRICES[matrix](*_data(case), sampled)


def cotangents(case: Case, matrix: str, sampled: Tensor | None = None) -> Tensor:
    """(K, *output.shape): what a matrix made of columns sends back."""
    if sampled is not None:
        return sampled
    output = dense.predict(case.make(), case.inputs)
    if matrix in ("empirical_fisher", "gradient_covariance"):
        output.requires_grad_()
        return torch.autograd.grad(dense.term_losses(case.criterion, output, case.targets).sum(), output)[0].unsqueeze(0)
    return dense.exact_cotangents(case.criterion, output, case.targets, dense.batch_size(case.inputs))


def mixes(model: nn.Module) -> bool:
    """Whether a BatchNorm normalises by the batch, so that examples mix."""
    return any(isinstance(module, _BatchNorm) and module.training for module in model.modules())


def one_pass(model: nn.Module, inputs: Tensor, sent: Tensor) -> Tensor:
    """(K, N, P): rows of one backward pass over the batch, for networks of Linear and BatchNorm1d on (N, features)."""
    seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen.append((name, module, args[0].detach().clone(), output))
            return output.clone()  # an in-place activation must not take the output's place

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name, _ in dense.layer_groups(model)]
    with dense.forward(model, inputs) as output:
        columns = [torch.autograd.grad(output, [each for *_, each in seen], column, retain_graph=True) for column in sent]
    for handle in handles:
        handle.remove()
    rows = []
    for grads in columns:
        parts = []
        for (_, module, x, _), g in zip(seen, grads, strict=True):
            if isinstance(module, _BatchNorm):
                parts += [g * (x - x.mean(0)) / (x.var(0, unbiased=False) + module.eps).sqrt(), g]
            else:
                parts += [torch.stack([torch.outer(gi, ai).flatten() for gi, ai in zip(g, x, strict=True)]), g]
        rows.append(torch.cat(parts, 1))
    return torch.stack(rows)


def columns(case: Case, matrix: str, sampled: Tensor | None = None) -> tuple[Tensor, float]:
    """(rows (n, P), factor): the matrix that a representation of columns holds is factor * sum over rows of u u^T."""
    model, criterion, inputs, targets = _data(case)
    if matrix == "batched_empirical_fisher":
        return dense.gradient(model, criterion, inputs, targets).unsqueeze(0), 1.0
    sent = cotangents(case, matrix, sampled)
    if matrix == "batched_fisher_mc":
        total = dense.column_gradients(model, criterion, inputs, sent)[0].sum(0, keepdim=True)
        return total, dense.scale(criterion, dense.predict(model, inputs), targets)
    rows = one_pass(model, inputs, sent) if mixes(model) else dense.column_gradients(model, criterion, inputs, sent)
    return rows.flatten(0, 1), dense.scale(criterion, dense.predict(model, inputs), targets)


def held(case: Case, matrix: str, sampled: Tensor | None = None) -> Tensor:
    """The (P, P) matrix whose blocks are held: `whole`, but where examples mix that of the columns of one pass."""
    if matrix in NO_COLUMNS or not mixes(case.make()):
        return whole(case, matrix, sampled)
    rows, factor = columns(case, matrix, sampled)
    return dense_derived.centred(rows, factor) if matrix == "gradient_covariance" else factor * rows.T @ rows


def _diagonal(case: Case, matrix: str, sampled: Tensor | None) -> Tensor:
    return dense.project_diagonal(held(case, matrix, sampled))


def _tied(model: nn.Module, names: list[str]) -> bool:
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    named = dict(model.named_parameters())
    return any(uses.count(id(named[name])) > 1 for name in names)


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


def kronecker(module: nn.Module) -> bool:
    """Whether the gradient of the weight is a product of inputs and outputs."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if is_parametrized(module) or not set(module._parameters) <= {"weight", "bias"}:
        return False
    return isinstance(module, nn.Linear | _ConvNd | nn.Embedding) or hasattr(module, "nf")


def fallback(model: nn.Module, layer: str, names: list[str]) -> str | None:
    """What a layer takes in place of `kron_io`, or None."""
    module = model.get_submodule(layer)
    if isinstance(module, NORMS):
        return "unit"
    if "weight" not in [name.rpartition(".")[2] for name in names]:
        return "diagonal"
    return "diagonal" if _tied(model, names) or not kronecker(module) else None


def embedding_pair(case: Case, layer: str, sent: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) of an Embedding: A the relative counts of the tokens that are no padding, B the sum of g g^T over their rows."""
    model = case.make()
    module = model.get_submodule(layer)
    seen: list[Tensor] = []
    module.register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
    with dense.forward(model, case.inputs) as output:
        grads = torch.stack([torch.autograd.grad(output, seen[1], column, retain_graph=True)[0] for column in sent])
    kept = seen[0] != (-1 if module.padding_idx is None else module.padding_idx)
    count = torch.tensor([float((seen[0][kept] == token).sum()) for token in range(module.num_embeddings)], dtype=torch.float64)
    rows = grads[:, kept].flatten(0, 1)
    scale = dense.scale(case.criterion, dense.predict(model, case.inputs), case.targets)
    return (count / kept.sum()).diag(), scale * rows.T @ rows


def _where(places: dict[str, slice], names: list[str]) -> Tensor:
    return torch.cat([torch.arange(places[name].start, places[name].stop) for name in names])


def kron_io(case: Case, matrix: str, sampled: Tensor | None = None, sharing: str = "expand", *, corrected: bool = False) -> Tensor:
    """K-FAC: B (x) A a layer, A (x) B for an Embedding, one product a group, the fallbacks elsewhere; I (x) A from inputs alone.

    corrected: EK-FAC, the exact diagonal in the eigenbasis of the products.
    """
    model, criterion, inputs, targets = _data(case)
    if matrix == "input_second_moment":
        return dense_derived.input_second_moment(model, criterion, inputs, targets, reduce=sharing == "reduce")
    if matrix == "ggn_recursive":
        return dense_recursive.ggn_recursive(model, criterion, inputs, targets, reduce=sharing == "reduce")
    M, sent = held(case, matrix, sampled), cotangents(case, matrix, sampled)
    found = {"unit": dense.project_unit(M, model), "diagonal": dense.project_diagonal(M)}
    places, result = dense.positions(model), torch.zeros_like(M)
    for layer, names in dense.layer_groups(model):
        if isinstance(model.get_submodule(layer), nn.MultiheadAttention):
            apart = _where(places, names)
            result[apart, apart] = M.diagonal()[apart]
            for where, block in _attention(case, layer, sent, sharing, M if corrected else None):
                result[where.unsqueeze(1), where] = block
            continue
        instead = fallback(model, layer, names)
        if isinstance(model.get_submodule(layer), nn.Embedding) and sharing == "reduce":
            instead = "diagonal"
        if instead is not None:
            where = _where(places, names)
            block = found[instead][where][:, where]
        elif isinstance(model.get_submodule(layer), nn.Embedding):
            where, pairs = _where(places, names), [embedding_pair(case, layer, sent)]
            block = dense_eigen.groups(pairs, M[where][:, where]) if corrected else torch.kron(*pairs[0])
        else:
            rule = dense_kron.kron_reduce if sharing == "reduce" else dense_kron.kron_expand
            found_pairs = rule(model, criterion, inputs, targets, sent, layer)
            pairs = found_pairs if isinstance(found_pairs, list) else [found_pairs]
            if not getattr(model.get_submodule(layer), "transposed", False):
                where = dense.joint_indices(model, layer)
            else:  # stored input first, and the bias apart
                where, pairs = _where(places, names[:1]), [(A, B) for B, A in pairs]
                for apart in (places[name] for name in names[1:]):
                    result[apart, apart] = M.diagonal()[apart].diag()
            if corrected:
                block = dense_eigen.groups(pairs, M[where][:, where])
            else:
                block = torch.block_diag(*(torch.kron(B.contiguous(), A.contiguous()) for B, A in pairs))
        result[where.unsqueeze(1), where] = block
    return result


def _attention(case: Case, layer: str, sent: Tensor, sharing: str, exact: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """(places, block) of the packed or separate projections of query, key and value, and of that of the output."""
    model, rule = case.make(), dense_kron.kron_reduce if sharing == "reduce" else dense_kron.kron_expand
    places, blocks = dense_attention.projections(model, layer), []
    for name, where in places.items():
        pair = rule(dense_attention.plain(model), case.criterion, case.inputs, case.targets, sent, f"{layer}.{name}")
        if len(where) < pair[0].shape[0] * pair[1].shape[0]:  # the packed bias of separate weights is apart
            pair = (pair[0], pair[1][:-1, :-1])
        blocks.append((where, torch.kron(*pair) if exact is None else dense_eigen.groups([pair], exact[where][:, where])))
    return blocks


def kron_dim_factors(case: Case, matrix: str, sampled: Tensor | None = None) -> dict[str, list[Tensor]]:
    """{parameter: its factors}."""
    rows, factor = columns(case, matrix, sampled)
    return {name: dense_kron.kron_dim(part, factor) for name, part in dense.split(rows, case.make()).items()}


def _network(case: Case, matrix: str, sampled: Tensor | None) -> Tensor:
    """FANG's: each weight on the bias of its unit, which is no pair between layers."""
    return dense_sparse.network(held(case, matrix, sampled), dense_sparse.parents(case.make(), "bias"))


_PROJECTED: dict[str, Callable[[Case, str, Tensor | None], Tensor]] = {
    "full": held,
    "matrix_free": whole,  # products pass through the whole batch at once, and are exact where examples mix
    "layer": lambda case, matrix, sampled: dense.project_layer(held(case, matrix, sampled), case.make()),
    "unit": lambda case, matrix, sampled: dense.project_unit(held(case, matrix, sampled), case.make()),
    "diagonal": _diagonal,
    "kron_io": kron_io,
    "kron_eigen": lambda case, matrix, sampled: kron_io(case, matrix, sampled, corrected=True),
    "full_sparse": _network,
    "layer_sparse": _network,
    "diagonal_sparse": _diagonal,  # no parameter of the cases is pruned
}
_PROJECTED |= {f"{scope}_{form}": _PROJECTED[scope] for scope in ("full", "layer", "unit") for form in ("low_rank", "gram")}
"""Rows of full rank are the matrix itself."""


def _finished(project: Callable[[Case, str, Tensor | None], Tensor]) -> Callable[[Case, str, Tensor | None], Tensor]:
    """What is not linear comes last: the absolute value is that of the projection of H."""

    def expected(case: Case, matrix: str, sampled: Tensor | None = None) -> Tensor:
        if matrix == "abs_hessian":
            return dense_derived.absolute(project(case, "hessian", sampled))
        return project(case, matrix, sampled)

    return expected


REPRESENTATIONS = {name: _finished(project) for name, project in _PROJECTED.items()}
