"""KFRA of convolutions against BackPACK 1.7.1, in float64 to 1e-10.

Its recursion is the same, over all numbers of an example's feature map. Of a convolution its B is the moment of the gradient summed over
positions, as in our reduction, and its A the number of positions times the mean of our expansion: their product is neither of ours.
"""

from __future__ import annotations

import pytest
from torch import Tensor

from oracles.peers import NETS, close
from oracles.test_backpack import differentiated, extensions, ours, pytestmark
from precond.representations import KronIO

__all__ = ["pytestmark"]

POSITIONS = {"0": 9, "2": 4, "5": 1}


def factors(name: str, layer: str, sharing: str) -> tuple[Tensor, Tensor]:
    B, A = ours(NETS[name], "ggn_recursive", KronIO(sharing=sharing)).blocks[layer].factors  # type: ignore[arg-type]
    return B.to_dense(), A.to_dense()


@pytest.mark.parametrize("layer", POSITIONS)
@pytest.mark.parametrize("name", ["conv-mean", "conv-sum"])
def test_kfra_of_convolutions(name: str, layer: str) -> None:
    module = differentiated(NETS[name], extensions.KFRA()).get_submodule(layer)
    B, A = module.weight.kfra
    size = len(A)  # without the homogeneous 1
    close(factors(name, layer, "reduce")[0], B)
    close(POSITIONS[layer] * factors(name, layer, "expand")[1][:size, :size], A)
    assert (POSITIONS[layer] == 1) == bool((factors(name, layer, "expand")[0] - B).norm() < 1e-3 * B.norm())
