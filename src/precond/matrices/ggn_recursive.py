"""The generalised Gauss-Newton matrix by a batch-averaged recursion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from precond.likelihoods import exact_column_chunks
from precond.matrices.base import REGISTRY, Matrix
from precond.matrices.ggn import refuse_indefinite
from precond.observe import Context, Link, Tensors, why_no_chain


@REGISTRY.register("ggn_recursive")
@dataclass(frozen=True, kw_only=True)
class GGNRecursive(Matrix):
    """Recursive Gauss-Newton: B_l (x) A_l for each layer, from batch averages passed down the network one layer at a time (KFRA).

    With h the pre-activations of a layer, phi the element-wise functions between it and the next, whose weights are W,

        G_l = (W^T G_{l+1} W) o E[phi'(h_l) phi'(h_l)^T],        G_L = (1/N) sum_i (d f_i / d h_L)^T (d^2 l_i / d f_i^2) (d f_i / d h_L),

    E the mean over examples. G is (D, D) over all D numbers that a layer gives for one example, so that convolutions, pooling by
    averages and positions of a sequence are exact linear maps of it; `kron_io` makes B of it, summed over positions. The start
    is exact, whatever follows the last layer of this matrix. Exact down to the pre-activations where N = 1 or the network is linear.

    Sums over the micro-batches and ranks of a step come before the recursion, which uses the weights of the step; histories average
    its results. Scale: that of the loss as given. For `nn.Sequential` of Linear, Conv1d-3d, element-wise layers, average
    pooling, Flatten, Identity and inactive Dropout; other modules raise `ObservationError`.

    Cost: the columns of `ggn` down to the last layer alone, one more forward pass, 2 D products with a layer's transpose; memory D^2
    a layer. Source: Botev, Ritter & Barber, "Practical Gauss-Newton optimisation for deep learning", 2017.

    >>> GGNRecursive().supplies
    ('factors',)
    """

    supplies = ("factors",)
    needs = "the model's output distribution; a sequential model of linear and element-wise layers; first-order passes only"

    @property
    def chained(self) -> bool:
        return True

    def refuse(self, model: nn.Module) -> str | None:
        return why_no_chain(model)

    def chunks(self, context: Context, limit: int) -> Iterator[Tensor]:
        refuse_indefinite(context, self.name)
        yield from exact_column_chunks(context.likelihood, context.output, context.target, context.batch, limit)

    def output_moments(self, links: Sequence[Link], output: Tensor, slopes: Tensors) -> Tensors:
        found = {links[-1].name: output}
        for above, link in zip(links[:0:-1], links[-2::-1], strict=True):
            G = found[above.name]
            found[link.name] = G * slopes[above.name] if above.elementwise else above.pull(G)
        return found
