"""What the Gram representations share: C = U^T U of a block by the factors of its rows, and their small Gram matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.blocks import Block
from precond.observe import Columns, Observation, Part
from precond.operators import Gram, Operator
from precond.operators.gram import Layer as Factors
from precond.representations.base import Representation, Statistics, refuse_kind, zeros
from precond.representations.factored_rows import Pair, Slot, joined, outermost, slots
from precond.statistics import Stat


@dataclass(frozen=True, kw_only=True)
class GramForm(Representation):
    """C = U^T U, one row an example and column, which is never formed where it is a sum of outer products.

    Kept are inputs a and output gradients g, what the step holds anyway; the operator adds the Gram matrix U U^T, n^2.
    """

    structure = Gram
    centres = True

    @property
    def rows(self) -> Stat:
        return Stat("rows")

    def centring(self) -> Mapping[str, Stat]:
        """The root of the weight of each row, of which the mean is made without forming it."""
        return {"roots": Stat("rows")}

    def statistics(self, block: Block) -> Mapping[str, Stat]:
        spec = {}
        for i in range(self.pieces(block)):
            spec |= {f"a{i}": Stat("rows", degree=0.0), f"g{i}": Stat("rows")}  # scales and weights are in g
        return spec

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if not isinstance(observation, Columns):
            raise refuse_kind(self, observation)
        found: list[list[Pair]] = [[] for _ in range(self.pieces(block))]
        roots = []
        for part in observation.parts:
            columns = next((g.shape[0] for _, seen in block.calls(part) for g in seen.grads if g is not None), None)
            if columns is None:  # nothing came back to the block
                continue
            root = (part.share * part.scale).abs().sqrt()
            for made, (a, g) in zip(found, self.factor(part, block, columns), strict=True):
                made.append((a, g * root.to(g.dtype)))
            roots.append(root.expand(part.batch, columns))
        if not roots:
            roots = [observation.weight.new_zeros(0, 1)]
            found = [[pair] for pair in self.nothing(block)]
        result: Statistics = {}
        for i, made in enumerate(found):
            result[f"a{i}"], result[f"g{i}"] = (joined(side) for side in zip(*made, strict=True))
        return result | ({"roots": torch.cat(roots).to(result["g0"].dtype)} if observation.centred else {})

    @abstractmethod
    def pieces(self, block: Block) -> int:
        """How many pairs of factors a block has."""

    @abstractmethod
    def factor(self, part: Part, block: Block, columns: int) -> Sequence[Pair]:
        """Each pair of one part, examples first, without the weights."""

    @abstractmethod
    def nothing(self, block: Block) -> Sequence[Pair]:
        """Each pair of no examples."""

    @abstractmethod
    def operands(self, pairs: Sequence[Pair], block: Block) -> Sequence[Factors | Tensor]:
        """What `Gram` is made of."""

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        pairs = [(_some(statistics[f"a{i}"]), _some(statistics[f"g{i}"])) for i in range(self.pieces(block))]
        C = Gram(self.operands(pairs, block))
        if "roots" not in statistics:
            return C
        roots = outermost(_some(statistics["roots"]))
        size = roots.norm()
        mean = roots / torch.where(size > 0, size, 1.0)
        weights = torch.eye(C.rank, dtype=C.dtype, device=C.device) - torch.outer(mean, mean)
        return Gram(C.pieces_given, weights.expand(*C.batch, -1, -1)) if C.batch else Gram(C.pieces_given, weights)


def _some(t: Tensor) -> Tensor:
    """At least one example, of zeros."""
    return t if len(t) else t.new_zeros(1, *t.shape[1:])


@dataclass(frozen=True, kw_only=True)
class FlatGram(GramForm):
    """What `full_gram` and `layer_gram` share: the coordinates are those of the parameters, one after another."""

    def pieces(self, block: Block) -> int:
        return len(slots(block))

    def factor(self, part: Part, block: Block, columns: int) -> Sequence[Pair]:
        made = [slot.pair(part, block) for slot in slots(block)]
        like = zeros(block, 0)
        return [
            slot.absent(part.batch, columns, None, like.dtype, like.device) if pair is None else pair
            for slot, pair in zip(slots(block), made, strict=True)
        ]

    def nothing(self, block: Block) -> Sequence[Pair]:
        like = zeros(block, 0)
        return [slot.absent(0, 1, None, like.dtype, like.device) for slot in slots(block)]

    def operands(self, pairs: Sequence[Pair], block: Block) -> Sequence[Factors | Tensor]:
        return [slot.factors(a, g) for slot, (a, g) in zip(slots(block), pairs, strict=True)]

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return sum(slot.out + slot.width for slot in slots(block) if slot.kind != "rows") * itemsize
