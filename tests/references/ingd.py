"""INGD, SINGD and IKFAC (Lin et al. 2023, 2024): the roots K, C of the inverse factors move by products, every layer by loops over small matrices.

A = mean of a a^T over rows with a 1 appended, B = N times the sum of g g^T of the mean loss's output gradients. On a refresh all move from the old:
H_K = K^T A K, H_C = C^T B C; m_K <- alpha m_K + (tr(H_C)/d_C H_K + damping tr(C^T C)/d_C K^T K - I) / 2 and m_C alike, projected onto the
group's Lie algebra; K <- K (I - step m_K). "ikfac": m_K = (K^T (A + damping I) K - I) / 2, no traces. Then D = C C^T G K K^T, SGD with momentum 0.9.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import dense
import dense_kron
import dense_psgd
from references.common import Batch, Drawn, Network, descend

NETS = ("mlp", "conv")
_RARELY: dict[str, Any] = {"curvature_interval": 3, "solver_interval": 3}
VARIANTS = {
    "default": ({}, {}),
    "released_interval": (_RARELY, {"interval": 3}),
    "normalised": ({"solver": {"step": 0.5, "normalise": True}}, {"step": 0.5, "normalise": True}),
    "damping": ({"damping": 0.5, "solver": {"momentum": 0.2}}, {"damping": 0.5, "momentum": 0.2}),
}
ONLY = {"damping": ("mlp",), "normalised": ("mlp",)}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"interval": 2}, {"damping": 2e-4}, {"momentum": 0.4}, {"step": 0.09}, {"method": "ikfac"}, {"group": "diagonal"}, {"early": True})


def _moved(own: dict[str, Tensor], A: Tensor, B: Tensor, damping: float, step: float, momentum: float, group: str, block: int, normalise: bool) -> None:
    K, C = own["K"], own["C"]
    IK, IC = torch.eye(len(K), dtype=K.dtype), torch.eye(len(C), dtype=C.dtype)
    if not normalise:
        own["K"], own["C"], own["mK"], own["mC"] = dense_psgd.ingd(
            K, C, A, B, own["mK"], own["mC"], damping=damping, step=step, momentum=momentum, group=group, block=block
        )
        return
    HK, HC = K.T @ A @ K, C.T @ B @ C
    gK = (HC.trace() / len(C) * HK + damping * (C.T @ C).trace() / len(C) * K.T @ K - IK) / 2
    gC = (HK.trace() / len(K) * HC + damping * (K.T @ K).trace() / len(K) * C.T @ C - IC) / 2
    own["mK"], own["mC"] = momentum * own["mK"] + (1 - momentum) * gK, momentum * own["mC"] + (1 - momentum) * gC
    own["K"] = K @ (IK - step / max(1.0, float(own["mK"].abs().max())) * own["mK"])
    own["C"] = C @ (IC - step / max(1.0, float(own["mC"].abs().max())) * own["mC"])


def train(
    network: Network, batches: list[Batch], drawn: Drawn, *, method: str = "ingd", group: str = "dense", block: int = 30, damping: float = 1e-4,
    step: float = 0.1, momentum: float = 0.5, normalise: bool = False, interval: int = 1, early: bool = False, reduce: bool = False,
    sampled: bool = False, lr: float = 1e-3,
) -> Tensor:  # fmt: skip
    """early: the direction is made before the roots move, which is wrong."""
    state: dict[str, dict[str, Tensor]] = {}
    seen = iter(drawn.labels)
    factors = dense_kron.kron_reduce if reduce else dense_kron.kron_expand

    def direction(model: nn.Module, t: int, batch: Batch, gradient: Tensor) -> Tensor:
        inputs, targets = batch
        if t % interval == 0:
            labels = next(seen) if sampled else targets
            output = dense.predict(model, inputs)
            cotangents = (output.softmax(1) - nn.functional.one_hot(labels, output.shape[1])).unsqueeze(0)
        result = torch.zeros_like(gradient)
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            where = dense.joint_indices(model, name)
            if t % interval == 0:
                B, A = factors(model, network.criterion, inputs, targets, cotangents, name)
                own = state.setdefault(name, {"K": torch.eye(len(A), dtype=A.dtype), "mK": 0 * A, "C": torch.eye(len(B), dtype=B.dtype), "mC": 0 * B})
                before = own | {}
                if method == "ikfac":
                    for root, F in (("K", A), ("C", B)):
                        K, I = own[root], torch.eye(len(F), dtype=F.dtype)  # noqa: E741
                        own[root] = K @ (I - step * dense_psgd.projected((K.T @ (F + damping * I) @ K - I) / 2, group, block))
                else:
                    _moved(own, A, B, damping, step, momentum, group, block, normalise)
            used = before if early else state[name]
            K, C = used["K"], used["C"]
            result[where] = torch.kron((C @ C.T).contiguous(), (K @ K.T).contiguous()) @ gradient[where]
        return result

    return descend(network, batches, direction, lr=lr, momentum=0.9)
