"""Convolutions and transposed convolutions of one to three dimensions, with groups, stride, dilation and every padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from precond.layers.base import channel_input, channel_rows, example_rows, output_grad
from precond.layers.lag_cost import by_lags, by_patches
from precond.layers.lags import Line, patch_moment
from precond.layers.linear import LinearRule
from precond.layers.registration import register
from precond.observe import LayerColumns


def padding_sides(module: _ConvNd) -> list[tuple[int, int]]:
    """By dimension, how much is padded in front and behind."""
    if isinstance(module.padding, str):
        total = [d * (k - 1) if module.padding == "same" else 0 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(p, p) for p in module.padding]


def pad_input(x: Tensor, module: _ConvNd) -> Tensor:
    """The input as the kernel reads it: padding is applied before patches are cut."""
    flat = [side for pair in reversed(padding_sides(module)) for side in pair]
    return F.pad(x, flat, mode="constant" if module.padding_mode == "zeros" else module.padding_mode) if any(flat) else x


def windows(x: Tensor, kernel: Sequence[int], dilation: Sequence[int], stride: Sequence[int]) -> Tensor:
    """(..., C, *spatial) -> (..., C, *places, *kernel): what a kernel reads at each place, as a view."""
    first = x.dim() - len(kernel)
    for i, (k, d, s) in enumerate(zip(kernel, dilation, stride, strict=True)):
        x = x.unfold(first + i, d * (k - 1) + 1, s)[..., ::d]
    return x


def grouped(patches: Tensor, groups: int, spatial: int, *, kernel: bool) -> Tensor:
    """(..., M, C, *places[, *kernel]) -> (..., G, M, R, C / G * prod(kernel))."""
    split = patches.unflatten(-(1 + spatial * (1 + kernel)), (groups, -1))
    lead = split.dim() - (3 + spatial * (1 + kernel))
    m, g, c = lead, lead + 1, lead + 2
    places = range(c + 1, c + 1 + spatial)
    order = (*range(lead), g, m, *places, c, *range(c + 1 + spatial, split.dim()))
    rows = split.permute(order)
    made: Tensor = rows.reshape(*rows.shape[: lead + 2], math.prod(rows.shape[lead + 2 : lead + 2 + spatial]), -1)
    return made


def lines(module: _ConvNd, sizes: Sequence[int]) -> list[Line]:
    """The dimensions of a convolution of stride 1 as `patch_moment` reads them: other padding than zeros is part of the image."""
    made = []
    for size, k, d, (front, behind) in zip(sizes, module.kernel_size, module.dilation, padding_sides(module), strict=True):
        zeros = Line(size=size, kernel=k, dilation=d, padding=front, places=size + front + behind - d * (k - 1))
        made.append(zeros if module.padding_mode == "zeros" else replace(zeros, size=size + front + behind, padding=0))
    return made


def _module(seen: LayerColumns) -> tuple[_ConvNd, int]:
    module = seen.module
    assert isinstance(module, _ConvNd)
    return module, len(module.kernel_size)


def patch_second_moment(x: Tensor, module: _ConvNd, homogeneous: bool) -> tuple[Tensor, int]:
    """The sum over patches of a a^T of stride 1 by lags, (G, in', in'), and their number; homogeneous: with a 1 at the end of a."""
    groups, width, dims = module.groups, x.shape[1] // module.groups * math.prod(module.kernel_size), lines(module, x.shape[2:])
    number = len(x) * math.prod(line.places for line in dims)
    moment = x.new_empty(groups, width + homogeneous, width + homogeneous)
    patch_moment(x if module.padding_mode == "zeros" else pad_input(x, module), groups, dims, moment[:, :width, :width])
    if homogeneous:
        patches = windows(pad_input(x.sum(0, keepdim=True), module), module.kernel_size, module.dilation, module.stride)
        total = patches.sum(tuple(range(2, 2 + len(dims)))).view(groups, width)
        moment[:, :width, -1] = moment[:, -1, :width] = total
        moment[:, -1, -1] = number
    return moment, number


class AnyConvolution(LinearRule):
    """What both directions share."""

    def groups(self, module: nn.Module) -> int:
        assert isinstance(module, _ConvNd)
        return module.groups

    def leading(self, seen: LayerColumns) -> int:
        return channel_input(seen, (_module(seen)[1] + 2,)).shape[0]


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class Convolution(AnyConvolution):
    """A Linear layer on patches: a_ir is the patch that output position r reads, of length in / groups * prod(kernel).

    Of stride 1, their second moment is made without patches where `by_lags` counts less than `by_patches`.
    """

    def input_moment(self, seen: LayerColumns, homogeneous: bool) -> tuple[Tensor, int] | None:
        module, spatial = _module(seen)
        x, groups = channel_input(seen, (spatial + 2,)), module.groups
        if any(s != 1 for s in module.stride) or type(self).inputs is not Convolution.inputs:  # a subclass may have other rows
            return None
        dims = lines(module, x.shape[2:])
        counted = (count(len(x), x.shape[1], groups, dims, x.element_size()).total(x.device.type) for count in (by_lags, by_patches))
        return patch_second_moment(x, module, homogeneous) if next(counted) < next(counted) else None

    def inputs(self, seen: LayerColumns) -> Tensor:
        module, spatial = _module(seen)
        x = pad_input(channel_input(seen, (spatial + 2,)), module)
        patches = windows(x, module.kernel_size, module.dilation, module.stride)
        return example_rows(grouped(patches, module.groups, spatial, kernel=True), seen, 1)

    def outputs(self, seen: LayerColumns) -> Tensor:
        module, spatial = _module(seen)
        return example_rows(grouped(output_grad(seen), module.groups, spatial, kernel=False), seen, 2)


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class TransposedConvolution(AnyConvolution):
    """Roles exchanged: a_ir is the input at position r, and g_ir the patch of the output's gradient that the kernel wrote from there.

    The weight is stored (in, out / groups, *kernel). The bias is no homogeneous coordinate: it is added once to each output position.
    """

    joint = False
    input_first = True

    def inputs(self, seen: LayerColumns) -> Tensor:
        module, spatial = _module(seen)
        return example_rows(grouped(channel_input(seen, (spatial + 2,)), module.groups, spatial, kernel=False), seen, 1)

    def outputs(self, seen: LayerColumns) -> Tensor:
        module, spatial = _module(seen)
        assert not isinstance(module.padding, str)
        g = F.pad(output_grad(seen), [side for p in reversed(module.padding) for side in (p, p)])
        patches = windows(g, module.kernel_size, module.dilation, module.stride)
        for i, size in enumerate(seen.input.shape[-spatial:]):  # output padding may leave room for a place that no input stands behind
            patches = patches.narrow(patches.dim() - 2 * spatial + i, 0, size)
        return example_rows(grouped(patches, module.groups, spatial, kernel=True), seen, 2)

    def bias(self, seen: LayerColumns) -> Tensor:
        return channel_rows(output_grad(seen), seen)
