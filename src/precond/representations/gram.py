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
from precond.representations.factored_rows import Pair, joined, outermost, slots
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
        spec: dict[str, Stat] = {}
        for i in range(self.pieces(block)):
            spec |= {f"a{i}": Stat("rows", degree=0.0), f"g{i}": Stat("rows")}  # scales and weights are in g
        return spec

    def measure(self, stage: str, observation: Observation, block: Block, statistics: Statistics) -> Statistics:
        if not isinstance(observation, Columns):
            raise refuse_kind(self, observation)
        found: list[list[Pair | None]] = [[] for _ in range(self.pieces(block))]
        roots, columns = [], 1
        for part in observation.parts:
            columns = next((g.shape[0] for _, seen in block.calls(part) for g in seen.grads if g is not None), columns)
            root = (part.share * part.scale).abs().sqrt()
            roots.append(root.expand(part.batch, columns))
            for made, pair in zip(found, self.factor(part, block), strict=True):
                made.append(None if pair is None else (pair[0], pair[1] * root.to(pair[1].dtype)))
        result: Statistics = {}
        for i, (made, nothing) in enumerate(zip(found, self.nothing(block, columns), strict=True)):
            like = next((pair for pair in made if pair is not None), nothing)
            filled = [pair or _zeros(like, len(root)) for pair, root in zip(made, roots, strict=True)]
            result[f"a{i}"], result[f"g{i}"] = (joined(side) for side in zip(*self.settle(i, filled, block), strict=True))
        return result | ({"roots": torch.cat(roots).to(result["g0"].dtype)} if observation.centred else {})

    @abstractmethod
    def pieces(self, block: Block) -> int:
        """How many pairs of factors a block has."""

    @abstractmethod
    def factor(self, part: Part, block: Block) -> Sequence[Pair | None]:
        """Each pair of one part, examples first, without the weights; None for what was not used."""

    def settle(self, piece: int, pairs: Sequence[Pair], block: Block) -> Sequence[Pair]:
        """The form in which the pairs of all parts are kept."""
        return pairs

    @abstractmethod
    def nothing(self, block: Block, columns: int) -> Sequence[Pair]:
        """Each pair of no examples."""

    @abstractmethod
    def operands(self, pairs: Sequence[Pair], block: Block) -> Sequence[Factors | Tensor]:
        """What `Gram` is made of."""

    def gram(self, statistics: Statistics, pairs: Sequence[Pair], block: Block) -> Tensor | None:
        """U U^T where it is not to be that of all coordinates."""
        return None

    def operator(self, statistics: Statistics, block: Block) -> Operator:
        pairs = [(_some(statistics[f"a{i}"]), _some(statistics[f"g{i}"])) for i in range(self.pieces(block))]
        operands, gram = self.operands(pairs, block), self.gram(statistics, pairs, block)
        C = Gram(operands, None, gram)
        if "roots" not in statistics:
            return C
        roots = outermost(_some(statistics["roots"]))
        size = roots.norm()
        mean = roots / torch.where(size > 0, size, 1.0)
        weights = torch.eye(C.rank, dtype=C.dtype, device=C.device) - torch.outer(mean, mean)
        return Gram(operands, weights.expand(*C.batch, -1, -1), gram)


def _zeros(like: Pair, examples: int) -> Pair:
    a, g = like
    return a.new_zeros(examples, *a.shape[1:]), g.new_zeros(examples, *g.shape[1:])


def _some(t: Tensor) -> Tensor:
    """At least one example, of zeros."""
    return t if len(t) else t.new_zeros(1, *t.shape[1:])


@dataclass(frozen=True, kw_only=True)
class FlatGram(GramForm):
    """What `full_gram` and `layer_gram` share: the coordinates are those of the parameters, one after another."""

    def pieces(self, block: Block) -> int:
        return len(slots(block))

    def factor(self, part: Part, block: Block) -> Sequence[Pair | None]:
        return [slot.pair(part, block) for slot in slots(block)]

    def settle(self, piece: int, pairs: Sequence[Pair], block: Block) -> Sequence[Pair]:
        return slots(block)[piece].settle(pairs)

    def one_hot(self, piece: int, block: Block) -> bool:
        """Whether the inputs of a pair are indices."""
        return slots(block)[piece].kind == "one_hot"

    def nothing(self, block: Block, columns: int) -> Sequence[Pair]:
        return [slot.nothing(columns, zeros(block, 0)) for slot in slots(block)]

    def operands(self, pairs: Sequence[Pair], block: Block) -> Sequence[Factors | Tensor]:
        return [slot.factors(a, g) for slot, (a, g) in zip(slots(block), pairs, strict=True)]

    def bytes_held(self, block: Block, itemsize: int) -> int:
        return sum(slot.out + slot.width for slot in slots(block) if slot.kind != "rows") * itemsize
