"""The second moment of a layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

from precond.matrices.base import REGISTRY, Matrix


@REGISTRY.register("input_second_moment")
@dataclass(frozen=True, kw_only=True)
class InputSecondMoment(Matrix):
    """Input second moment: I (x) A for each layer, A the mean over rows of a a^T with the homogeneous 1.

    Its inverse regresses the gradients of the neurons on the inputs. No backward pass is needed and nothing depends on
    the loss, so it has degree 0 in it. Layers without inputs of that kind (normalisation, bias alone) are left as they
    are. Source: Benzing, "Gradient descent on neurons and its link to approximate second-order optimization" (FOOF), 2022.

    >>> InputSecondMoment().supplies
    ('factors',)
    """

    supplies = ("factors",)
    needs = "nothing beyond the forward pass"
