"""Kronecker oracles: the factors of K-FAC (expand and reduce) and of the dimension-wise form, by plain loops over captured rows.

Claims (methods A.5, C.7; rows are examples x positions, and the calls of a module that is used several times are further positions):

* a layer's block is approximated by B (x) A in the order of vec[W, b] (`dense.joint_indices`); A carries the 1 of a trainable bias;
* expand: A = mean over all rows of a a^T, B = scale * sum over columns and rows of g g^T;
* reduce: a is averaged and g summed over an example's positions first, A = mean over examples, B = scale * sum over columns, examples;
* g is the gradient of a column's term losses in the layer's output, unscaled; scale is 1 / N_terms for 'mean', 1 for 'sum';
* a convolution's rows are its patches in the order of weight[o].flatten(); a grouped one gives one pair for each group, over the
  group's own channels;
* over dimensions, a tensor may be read in another shape and cut into tiles: each tile has the factors of its own part of the gradients, and
  nothing lies between tiles; a factor may be left the identity or cut to its diagonal;
* a structured factor is the dense one restricted: to its diagonal or to blocks on it; or made of the mean row alone;
* a transposed convolution's input rows are its input at each location, its output rows the patches of g that each location wrote, in the
  order of weight[i].flatten(); its bias is apart.

Cotangents are back-propagated through the whole batch at once: rows belong to their example as long as examples do not mix.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

import dense
from dense_terms import Criterion

Pair = tuple[Tensor, Tensor]


def unfold(conv: nn.Module, x: Tensor) -> Tensor:
    """Patches of a convolution's input, (N, C_in, prod(kernel), *output spatial), by a loop over kernel positions."""
    spatial, kernel = x.dim() - 2, conv.kernel_size
    if conv.padding == "same":
        both = [conv.dilation[d] * (kernel[d] - 1) for d in range(spatial)]
        pads = [(total // 2, total - total // 2) for total in both]
    else:
        pads = [(0, 0) if conv.padding == "valid" else (conv.padding[d], conv.padding[d]) for d in range(spatial)]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, [side for pair in reversed(pads) for side in pair], mode=mode)
    sizes = [(x.shape[2 + d] - conv.dilation[d] * (kernel[d] - 1) - 1) // conv.stride[d] + 1 for d in range(spatial)]
    patches = []
    for offset in itertools.product(*(range(size) for size in kernel)):
        starts = [offset[d] * conv.dilation[d] for d in range(spatial)]
        where = [slice(starts[d], starts[d] + conv.stride[d] * (sizes[d] - 1) + 1, conv.stride[d]) for d in range(spatial)]
        patches.append(x[(slice(None), slice(None), *where)])
    return torch.stack(patches, 2)


def _input_rows(layer: nn.Module, x: Tensor, batch: int) -> list[Tensor]:
    """One (N, R, in') tensor for each group, with the homogeneous 1 if there is a trainable bias."""
    if isinstance(layer, nn.Linear) or hasattr(layer, "nf"):
        groups = [x.reshape(batch, -1, x.shape[-1])]
    elif isinstance(layer, _ConvNd) and layer.transposed:
        return list(x.flatten(2).transpose(1, 2).split(layer.in_channels // layer.groups, -1))
    elif isinstance(layer, _ConvNd) and not layer.transposed:
        channels = layer.in_channels // layer.groups
        groups = [chunk.flatten(1, 2).flatten(2).transpose(1, 2) for chunk in unfold(layer, x).split(channels, 1)]
    else:
        raise TypeError(f"The Kronecker oracle knows Linear and convolutions, not {type(layer).__name__}.")
    if layer.bias is None or not layer.bias.requires_grad:
        return groups
    return [torch.cat([a, torch.ones_like(a[..., :1])], -1) for a in groups]


def _written(conv: nn.Module, g: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """What a transposed convolution wrote from each input location, (N, C_out, prod(kernel), *input spatial); zero beyond the output."""
    made = g.new_zeros(*g.shape[:2], math.prod(conv.kernel_size), *sizes)
    for n, offset in enumerate(itertools.product(*(range(size) for size in conv.kernel_size))):
        for place in itertools.product(*(range(size) for size in sizes)):
            at = [p * s - pad + o * d for p, s, pad, o, d in zip(place, conv.stride, conv.padding, offset, conv.dilation, strict=True)]
            if all(0 <= a < size for a, size in zip(at, g.shape[2:], strict=True)):
                made[(slice(None), slice(None), n, *place)] = g[(slice(None), slice(None), *at)]
    return made


def _output_rows(layer: nn.Module, g: Tensor, batch: int, sizes: tuple[int, ...] = ()) -> list[Tensor]:
    """One (N, R, out) tensor for each group."""
    if isinstance(layer, nn.Linear) or hasattr(layer, "nf"):
        return [g.reshape(batch, -1, g.shape[-1])]
    if layer.transposed:
        return [
            chunk.flatten(1, 2).flatten(2).transpose(1, 2)
            for chunk in _written(layer, g, sizes).split(layer.out_channels // layer.groups, 1)
        ]
    return list(g.flatten(2).transpose(1, 2).split(layer.out_channels // layer.groups, -1))


def capture(model: nn.Module, inputs: dense.Inputs, cotangents: Tensor, layer_name: str) -> list[Pair]:
    """[(a, g)] for each group of the layer: a is (N, R, in') and g is (K, N, R, out), all calls of the layer along R.

    The hook hands a copy on, so that an in-place activation after the layer cannot take the place of the layer's own output.
    """
    layer, batch = model.get_submodule(layer_name), dense.batch_size(inputs)
    seen: list[tuple[list[Tensor], Tensor, tuple[int, ...]]] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append((_input_rows(module, args[0].detach(), batch), output, tuple(args[0].shape[2:])))
        return output.clone()

    handle = layer.register_forward_hook(keep)
    try:
        with dense.forward(model, inputs) as output:
            outputs = [each for _, each, _ in seen]
            columns = [torch.autograd.grad(output, outputs, cotangent, retain_graph=True) for cotangent in cotangents]
    finally:
        handle.remove()
    pairs = []
    for group in range(len(seen[0][0])):
        a = torch.cat([rows[group] for rows, *_ in seen], 1)
        sizes = [size for *_, size in seen]
        g = torch.stack(
            [
                torch.cat([_output_rows(layer, each, batch, size)[group] for each, size in zip(column, sizes, strict=True)], 1)
                for column in columns
            ]
        )
        pairs.append((a, g))
    return pairs


def _mean_outer(a: Tensor) -> Tensor:
    return sum(torch.outer(row, row) for row in a) / a.shape[0]


def _sum_outer(g: Tensor) -> Tensor:
    return sum(torch.outer(row, row) for row in g)


def _answer(layer: nn.Module, pairs: list[Pair]) -> Pair | list[Pair]:
    return pairs if getattr(layer, "groups", 1) > 1 else pairs[0]


def kron_expand(
    model: nn.Module, criterion: Criterion, inputs: dense.Inputs, targets: Tensor, cotangents: Tensor, layer_name: str
) -> Pair | list[Pair]:
    """K-FAC expand: (B, A), or a list of them, one a group, for a grouped convolution. Cotangents as for `dense.fisher_mc`."""
    scale = dense.scale(criterion, dense.predict(model, inputs), targets)
    pairs = capture(model, inputs, cotangents, layer_name)
    factors = [(scale * _sum_outer(g.flatten(0, 2)), _mean_outer(a.flatten(0, 1))) for a, g in pairs]
    return _answer(model.get_submodule(layer_name), factors)


def kron_reduce(
    model: nn.Module, criterion: Criterion, inputs: dense.Inputs, targets: Tensor, cotangents: Tensor, layer_name: str
) -> Pair | list[Pair]:
    """K-FAC reduce: (B, A), or a list of them, one a group, for a grouped convolution. Cotangents as for `dense.fisher_mc`."""
    scale = dense.scale(criterion, dense.predict(model, inputs), targets)
    pairs = capture(model, inputs, cotangents, layer_name)
    factors = [(scale * _sum_outer(g.sum(2).flatten(0, 1)), _mean_outer(a.mean(1))) for a, g in pairs]
    return _answer(model.get_submodule(layer_name), factors)


def kron_dim(gradients: Tensor, scale: float = 1.0) -> list[Tensor]:
    """[Omega_m] of one tensor: scale * sum_n contract_m(G_n), contract_m the outer product of the mode-m unfolding.

    `gradients` is (n, *shape): one parameter's part of the columns, `dense.split(U, model)[name].flatten(0, 1)` for U (K, N, P).
    """
    factors = []
    for mode in range(gradients.dim() - 1):
        unfolded = [gradient.movedim(mode, 0).reshape(gradient.shape[mode], -1) for gradient in gradients]
        factors.append(scale * sum(each @ each.T for each in unfolded))
    return factors


def power(F: Tensor, p: float) -> Tensor:
    """F^p of a positive semi-definite matrix; an eigenvalue within rounding of zero is zero, which a root would make large."""
    d, U = torch.linalg.eigh(F)
    return (U * torch.where(d > 1e-14 * d.max(), d, 0.0) ** p) @ U.T


def kron_dim_product(gradients: Tensor, forms: list[str], *, trace: bool = False, scale: float = 1.0) -> Tensor:
    """One Kronecker product over the dimensions of tensors (n, *shape), each factor dense, cut to its diagonal or left the identity."""
    factors = kron_dim(gradients, scale)
    total, kept = torch.trace(factors[0]), sum(form != "identity" for form in forms)
    result = torch.ones(1, 1, dtype=gradients.dtype)
    for factor, form in zip(factors, forms, strict=True):
        made = restricted(factor, form, [])
        if form == "identity":
            result = torch.kron(result, made / (len(factor) if trace else 1))
        else:
            result = torch.kron(result, made if trace else power(made, 1 / kept))
    return result / total ** (kept - 1) if trace and total > 0 else result


def tiles(shape: list[int], pieces: list[list[int]]) -> list[Tensor]:
    """The places of each tile of a tensor in its flat order, in the order of the tile; `pieces` are lengths along each dimension."""
    index, found = torch.arange(math.prod(shape)).reshape(shape), []
    cuts = [[(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))] for lengths in pieces]
    for corner in itertools.product(*cuts):
        found.append(index[tuple(slice(start, end) for start, end in corner)])
    return found


def kron_dim_tiled(gradients: Tensor, shape: list[int], pieces: list[list[int]], forms: list[str], **options: float) -> Tensor:
    """(p, p), in the order of the tensor, from gradients (n, *tensor): one product a tile of the tensor read as `shape`."""
    flat = gradients.flatten(1)
    result = flat.new_zeros(flat.shape[1], flat.shape[1])
    for place in tiles(shape, pieces):
        where = place.flatten()
        result[where.unsqueeze(1), where] = kron_dim_product(flat[:, where].reshape(-1, *place.shape), forms, **options)
    return result


def restricted(F: Tensor, structure: str, blocks: list[int]) -> Tensor:
    """A factor restricted to a structure; `blocks` are the sizes of its blocks."""
    if structure == "diagonal":
        return F.diagonal().diag()
    if structure == "identity":
        return torch.eye(len(F), dtype=F.dtype)
    if structure == "block":
        kept, start = torch.zeros_like(F), 0
        for size in blocks:
            inside = slice(start, start + size)
            kept[inside, inside] = F[inside, inside]
            start += size
        return kept
    return F


def rank_one(rows: Tensor, weight: float) -> Tensor:
    """weight * m m^T of the mean row m."""
    mean = sum(rows) / len(rows)
    return weight * torch.outer(mean, mean)
