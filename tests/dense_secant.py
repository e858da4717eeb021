"""Training by secant pairs in float64 with plain loops: what `bfgs_hessian` must do, one block and one pair at a time.

No code of the library: gradients by autograd at given parameters, B and its inverse from the textbook updates, Powell's damping written
with numbers. Blocks are lists of indices into the flat parameter vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

Loss = Callable[[Tensor], Tensor]


@dataclass
class Rule:
    powell: float = 0.2
    second: str = "none"
    amount: float = 0.0
    skip: float = 1e-8
    scale_initial: bool = False
    powell_on: str = "matrix"


def direct(B: Tensor, s: Tensor, y: Tensor, rule: Rule, first: bool) -> tuple[Tensor, bool]:
    """B after one pair, by Powell's rule for B, or for its inverse; and whether the pair counted."""
    sy, sBs = float(s @ y), float(s @ B @ s)
    if rule.powell and rule.powell_on == "inverse":
        s = powell_for_inverse(torch.linalg.inv(B), s, y, rule.powell)
    elif rule.powell and sy < rule.powell * sBs:
        theta = (1 - rule.powell) * sBs / (sBs - sy)
        y = theta * y + (1 - theta) * (B @ s)
    y = second(s, y, rule)
    if not float(s @ y) > rule.skip * float(s.norm()) * float(y.norm()):
        return B, False
    if first and rule.scale_initial:
        B = B * float(y @ y) / float(s @ y)
    return B - torch.outer(B @ s, B @ s) / (s @ B @ s) + torch.outer(y, y) / (s @ y), True


def inverse(H: Tensor, s: Tensor, y: Tensor, rule: Rule, first: bool) -> tuple[Tensor, bool]:
    """H after one pair, by Powell's rule for H."""
    s = powell_for_inverse(H, s, y, rule.powell) if rule.powell else s
    y = second(s, y, rule)
    if not float(s @ y) > rule.skip * float(s.norm()) * float(y.norm()):
        return H, False
    if first and rule.scale_initial:
        H = H * float(s @ y) / float(y @ y)
    eye, rho = torch.eye(len(s), dtype=s.dtype), 1 / float(s @ y)
    left = eye - rho * torch.outer(s, y)
    return left @ H @ left.T + rho * torch.outer(s, s), True


def powell_for_inverse(H: Tensor, s: Tensor, y: Tensor, mu: float) -> Tensor:
    sy, yHy = float(s @ y), float(y @ H @ y)
    if sy >= mu * yHy:
        return s
    theta = (1 - mu) * yHy / (yHy - sy)
    return theta * s + (1 - theta) * (H @ y)


def second(s: Tensor, y: Tensor, rule: Rule) -> Tensor:
    sy, ss = float(s @ y), float(s @ s)
    if rule.second == "mix" and sy < rule.amount * ss:
        theta = (1 - rule.amount) * ss / (ss - sy)
        return theta * y + (1 - theta) * s
    return y + rule.amount * s if rule.second == "add" else y


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def split(model: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    pieces = theta.split([p.numel() for p in model.parameters()])
    return {n: piece.view(p.shape) for (n, p), piece in zip(model.named_parameters(), pieces, strict=True)}


def loss_of(model: nn.Module, criterion: nn.Module, x: Tensor, t: Tensor) -> Loss:
    return lambda theta: criterion(functional_call(model, split(model, theta), (x,)), t)


def gradient(loss: Loss, theta: Tensor) -> Tensor:
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(loss(theta), theta)[0]


def hessian(loss: Loss, theta: Tensor) -> Tensor:
    found: Tensor = torch.autograd.functional.hessian(loss, theta)
    return found


def train(
    model: nn.Module, losses: Sequence[Loss], blocks: Sequence[Sequence[int]], *, pairs: str, lr: float, damping: float, rule: Rule,
    invert: bool = False, decay: float = 0.0,
) -> list[Tensor]:  # fmt: skip
    """The parameters after each step of theta <- theta - lr (B + damping I)^-1 g; invert: of H, which follows y + damping s."""
    theta, path = flat(model), []
    eyes = [torch.eye(len(b), dtype=theta.dtype) for b in blocks]
    held = [eye / (1 + damping) if invert else eye.clone() for eye in eyes]
    average = [(torch.zeros(len(b), dtype=theta.dtype), torch.zeros(len(b), dtype=theta.dtype)) for b in blocks]
    counted = [0] * len(blocks)
    previous: tuple[Tensor, Tensor] | None = None
    started = pairs == "gradients"

    def follow(s: Tensor, y: Tensor) -> None:
        for k, block in enumerate(blocks):
            old_s, old_y = average[k]
            average[k] = (decay * old_s + (1 - decay) * s[block], decay * old_y + (1 - decay) * y[block])
            sk, yk = average[k]
            if invert and not started_inverse[k]:
                B, counts = direct(eyes[k].clone(), sk, yk, rule, counted[k] == 0)
                held[k] = torch.linalg.inv(B + damping * eyes[k])  # the first inverse is exact
                started_inverse[k], counts = True, False
            elif invert:
                held[k], counts = inverse(held[k], sk, yk + damping * sk, rule, counted[k] == 0)
            else:
                held[k], counts = direct(held[k], sk, yk, rule, counted[k] == 0)
            counted[k] += counts

    started_inverse = [pairs == "gradients"] * len(blocks)
    for loss in losses:
        g = gradient(loss, theta)
        if pairs == "gradients" and previous is not None:
            follow(theta - previous[0], g - previous[1])
        previous = (theta, g)
        step = g.clone()
        if started:
            for k, block in enumerate(blocks):
                step[block] = held[k] @ g[block] if invert else torch.linalg.solve(held[k] + damping * eyes[k], g[block])
        new = theta - lr * step
        if pairs == "replay":
            follow(new - theta, gradient(loss, new) - g)
        if pairs == "products":
            follow(new - theta, hessian(loss, new) @ (new - theta))
        theta, started = new, True
        path.append(theta)
    return path


def kbfgs(
    weights: list[Tensor], batches: Sequence[tuple[Tensor, Tensor]], activate: Callable[[Tensor], Tensor], loss: Callable[[Tensor, Tensor], Tensor],
    *, lr: float, damping: float, beta: float, rule: Rule, decay: float, initial: float | None,
) -> list[Tensor]:  # fmt: skip
    """K-BFGS of a multi-layer perceptron with weights [W, b] (out, in + 1), all factors damped by sqrt(damping); `initial` * I is the first H_g.

    A takes the batch in before the step, both inverses after it.
    """
    root = damping**0.5
    weights = [w.clone() for w in weights]
    A: list[Tensor] = [torch.zeros(w.shape[1], w.shape[1], dtype=w.dtype) for w in weights]
    weight = 0.0
    A_LM, H_a = list(A), list(A)
    first = 1 / (1 + root) if initial is None else initial
    H_g = [first * torch.eye(len(w), dtype=w.dtype) for w in weights]
    average = [(torch.zeros(len(w), dtype=w.dtype), torch.zeros(len(w), dtype=w.dtype)) for w in weights]

    def run(x: Tensor, t: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Inputs with the homogeneous 1, outputs, and gradients of the mean loss there."""
        inputs, outputs = [], []
        for k, w in enumerate(weights):
            inputs.append(torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1))
            h = (inputs[-1] @ w.T).requires_grad_() if k == 0 else inputs[-1] @ w.T
            outputs.append(h)
            x = activate(h) if k < len(weights) - 1 else h
        grads = torch.autograd.grad(loss(x, t), outputs)
        return [a.detach() for a in inputs], [h.detach() for h in outputs], list(grads)

    path = []
    for x, t in batches:
        inputs, outputs, grads = run(x, t)
        weight = beta * weight + 1 - beta
        for k, a in enumerate(inputs):
            A[k] = beta * A[k] + (1 - beta) * a.T @ a / len(a)
            A_LM[k] = A[k] / weight + root * torch.eye(a.shape[1], dtype=a.dtype)
            if not path:
                H_a[k] = torch.linalg.inv(A_LM[k])
        weights_old = weights
        weights = [w - lr * H_g[k] @ (grads[k].T @ inputs[k]) @ H_a[k] for k, w in enumerate(weights_old)]
        _, moved, moved_grads = run(x, t)
        for k in range(len(weights)):
            along = H_a[k] @ inputs[k].mean(0)
            H_a[k] = inverse(H_a[k], along, A_LM[k] @ along, Rule(powell=0.0), False)[0]
            old_s, old_y = average[k]
            s = decay * old_s + (1 - decay) * (moved[k].mean(0) - outputs[k].mean(0))
            y = decay * old_y + (1 - decay) * (moved_grads[k].sum(0) - grads[k].sum(0))
            average[k] = (s, y)
            H_g[k] = inverse(H_g[k], s, y + root * s, rule, False)[0]
        path.append(torch.cat([torch.cat([w[:, :-1].flatten(), w[:, -1]]) for w in weights]))
    return path
