"""Hooks and automatic differentiation: the only package that touches either."""

from precond.observe.again import Again, number
from precond.observe.assemble import TermWeights, chained, columns, factors, product, reduced, sampled_gradient, term_weights
from precond.observe.batch import differentiate_batch
from precond.observe.chain import Link, why_no_chain
from precond.observe.demand import Context, Demand, Reduce, Reduced
from precond.observe.grouping import by_layer
from precond.observe.guard import busy, own_pass
from precond.observe.hooks import Handles, Hook
from precond.observe.moved import check_slope, losses, moved_columns, moved_slope, slope, weight
from precond.observe.names import canonical
from precond.observe.observation import (
    Columns,
    Distribution,
    Factors,
    Gradient,
    Kind,
    LayerColumns,
    Moved,
    Observation,
    Pair,
    Part,
    Probes,
    Product,
    Slope,
    Tensors,
)
from precond.observe.observer import Observer
from precond.observe.own_loss import LossReader, OwnLoss
from precond.observe.passes import batched_grad, nested_columns
from precond.observe.probes import probes, whitening
from precond.observe.records import CriterionCall, Forward
from precond.observe.replay import drawing_again
from precond.observe.selfcheck import SelfCheck
from precond.observe.shared import SHARED
from precond.observe.trees import field_of, tensors_in
from precond.observe.truth import true_columns
from precond.randomness import keyed_generator

__all__ = [
    "SHARED", "Again", "Columns", "Context", "CriterionCall", "Demand", "Distribution", "Factors", "Forward", "Gradient", "Handles",
    "Hook", "Kind", "LayerColumns", "Link", "LossReader", "Moved", "Observation", "Observer", "OwnLoss", "Pair", "Part", "Probes",
    "Product", "Reduce", "Reduced", "SelfCheck", "Slope", "Tensors", "TermWeights", "batched_grad", "busy", "by_layer", "canonical",
    "chained", "check_slope", "columns", "differentiate_batch", "drawing_again", "factors", "field_of", "keyed_generator", "losses",
    "moved_columns", "moved_slope", "nested_columns", "number", "own_pass", "probes", "product", "reduced", "sampled_gradient", "slope",
    "tensors_in", "term_weights", "true_columns", "weight", "whitening", "why_no_chain",
]  # fmt: skip
