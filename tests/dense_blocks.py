"""Projections of a dense (P, P) matrix on the blocks of a network: layer, tensor, unit, diagonal.

Claims:

* theta is in the order of `model.parameters()`, trainable ones only, each flattened row-major; frozen parameters have no place;
* the blocks of each projection are disjoint and cover theta, so a projection keeps those entries and puts zero elsewhere;
* diagonal is inside unit and tensor, and both are inside layer;
* a parameter belongs to the first module, in `named_modules` order, that owns it (a tied one to its first owner);
  `nn.MultiheadAttention` owns its `out_proj`'s parameters too, for it does not call that module, and a module whose tensors are
  parametrized owns what they are made of;
* a weight stored (in, out), as `transformers`' `Conv1D` has it (known here by its `nf`), counts as its transpose.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


def positions(model: nn.Module) -> dict[str, slice]:
    """{parameter name: its slice of theta}."""
    places, start = {}, 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            places[name] = slice(start, start + parameter.numel())
            start += parameter.numel()
    return places


def layer_groups(model: nn.Module) -> list[tuple[str, list[str]]]:
    """(module name, its trainable parameters' names), one entry for each module that is the first owner of any.

    What is in a list or a dictionary of parameters belongs to the module that holds the list.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups, taken = [], set()
    for module_name, module in model.named_modules():
        owned = []
        held = [child for child in module.children() if isinstance(child, nn.ParameterList | nn.ParameterDict)]  # which no one calls
        own = module.parameters(recurse=isinstance(module, nn.MultiheadAttention) or is_parametrized(module))
        for parameter in (*own, *(p for child in held for p in child.parameters())):
            if id(parameter) in names and id(parameter) not in taken:
                taken.add(id(parameter))
                owned.append(names[id(parameter)])
        if owned:
            groups.append((module_name, owned))
    return groups


def _range(place: slice) -> Tensor:
    return torch.arange(place.start, place.stop)


def joint_indices(model: nn.Module, layer_name: str) -> Tensor:
    """The places in theta of vec[W, b] of one layer: row o of W.reshape(rows, -1), then b[o]. `M[i][:, i]` is in the order of B (x) A."""
    module, places = model.get_submodule(layer_name), positions(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weight = _range(places[names[id(module.weight)]]).reshape(module.weight.shape[0], -1)
    weight = weight.T if hasattr(module, "nf") else weight
    if module.bias is None or names[id(module.bias)] not in places:
        return weight.flatten()
    return torch.cat([weight, _range(places[names[id(module.bias)]]).unsqueeze(1)], 1).flatten()


def _separate(parameter: nn.Parameter, index: Tensor) -> list[Tensor]:
    """Units of a tensor on its own: rows of dimension 0, or single elements of a 1-D tensor."""
    return list(index.reshape(parameter.shape[0] if parameter.dim() else 1, -1))


def unit_indices(model: nn.Module) -> list[Tensor]:
    """The places in theta of each unit.

    A norm: unit j is (weight_j, bias_j). Attention: the rows of its packed and of its output weight with their biases. A module with a
    weight of two or more dimensions and no other parameter than a bias (Linear, Conv, Embedding): unit o is row o of
    weight.reshape(rows, -1) and bias[o]. Else (separate, transposed, bilinear, bias alone): each tensor separately, rows of dimension 0,
    or single elements of a 1-D tensor.
    """
    places, named, units = positions(model), dict(model.named_parameters()), []
    for module_name, group in layer_groups(model):
        module = model.get_submodule(module_name)
        index = {name.rpartition(".")[2]: _range(places[name]) for name in group}
        weight = getattr(module, "weight", None)
        if isinstance(module, _NORMS):
            units += list(torch.stack([index[key] for key in ("weight", "bias") if key in index], 1))
        elif isinstance(module, nn.MultiheadAttention):
            units += _attention_units(module, {name.removeprefix(f"{module_name}."): _range(places[name]) for name in group})
        elif (
            set(index) <= {"weight", "bias"}
            and "weight" in index
            and weight.dim() > 1
            and not isinstance(module, _ConvTransposeNd | nn.Bilinear)
        ):
            table = index["weight"].reshape(weight.shape[0], -1)
            parts = [table.T if hasattr(module, "nf") else table] + ([index["bias"].unsqueeze(1)] if "bias" in index else [])
            units += list(torch.cat(parts, 1))
        else:
            for name in group:
                units += _separate(named[name], _range(places[name]))
    return units


def _attention_units(module: nn.MultiheadAttention, index: dict[str, Tensor]) -> list[Tensor]:
    units = []
    for weight, bias in (("in_proj_weight", "in_proj_bias"), ("out_proj.weight", "out_proj.bias")):
        if weight in index:
            column = [index.pop(bias).unsqueeze(1)] if bias in index else []
            table = index.pop(weight)
            units += list(torch.cat([table.reshape(module.get_parameter(weight).shape), *column], 1))
    for name, places in index.items():
        units += _separate(module.get_parameter(name), places)
    return units


def _keep(M: Tensor, blocks: list[Tensor]) -> Tensor:
    kept = torch.zeros_like(M)
    for index in blocks:
        kept[index.unsqueeze(1), index] = M[index.unsqueeze(1), index]
    return kept


def project_layer(M: Tensor, model: nn.Module) -> Tensor:
    """Zero outside the blocks of the layers of `layer_groups`."""
    places = positions(model)
    return _keep(M, [torch.cat([_range(places[name]) for name in group]) for _, group in layer_groups(model)])


def project_tensor(M: Tensor, model: nn.Module) -> Tensor:
    """Zero outside the blocks of single parameters."""
    return _keep(M, [_range(place) for place in positions(model).values()])


def project_unit(M: Tensor, model: nn.Module) -> Tensor:
    """Zero outside the blocks of `unit_indices`."""
    return _keep(M, unit_indices(model))


def kernel_indices(model: nn.Module) -> list[Tensor]:
    """The places in theta of each mini-block: a kernel (out, in) of a tensor of order 3 or more, a row of a matrix, an element of a vector.

    A row of a matrix is an output unit, also where the weight is stored (in, out).
    """
    places, blocks = positions(model), []
    for name, parameter in model.named_parameters():
        if name in places:
            index = _range(places[name]).reshape(parameter.shape)
            if parameter.dim() > 2:
                blocks += [index[o, i].flatten() for o in range(parameter.shape[0]) for i in range(parameter.shape[1])]
            elif parameter.dim() == 2:
                stored_first = hasattr(model.get_submodule(name.rpartition(".")[0]), "nf")
                blocks += list(index.T if stored_first else index)
            else:
                blocks += list(index.reshape(-1, 1))
    return blocks


def project_kernel(M: Tensor, model: nn.Module) -> Tensor:
    """Zero outside the blocks of `kernel_indices`."""
    return _keep(M, kernel_indices(model))


def project_diagonal(M: Tensor) -> Tensor:
    """Zero outside the diagonal."""
    return M.diagonal().diag()
