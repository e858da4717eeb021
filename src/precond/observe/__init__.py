"""Hooks and automatic differentiation: the only package that touches either."""

from precond.observe.assemble import columns, factors, product, reduced, sampled_gradient
from precond.observe.batch import differentiate_batch
from precond.observe.demand import Context, Demand
from precond.observe.grouping import by_layer
from precond.observe.guard import busy, own_pass
from precond.observe.hooks import Handles, Hook
from precond.observe.names import canonical
from precond.observe.observation import Columns, Factors, Gradient, Kind, LayerColumns, Observation, Part, Product, Tensors
from precond.observe.observer import Observer
from precond.observe.passes import batched_grad, nested_columns
from precond.observe.randomness import keyed_generator
from precond.observe.records import CriterionCall, Forward
from precond.observe.selfcheck import SelfCheck
from precond.observe.trees import tensors_in
from precond.observe.truth import true_columns

__all__ = [
    "Columns", "Context", "CriterionCall", "Demand", "Factors", "Forward", "Gradient", "Handles", "Hook", "Kind", "LayerColumns",
    "Observation", "Observer", "Part", "Product", "SelfCheck", "Tensors", "batched_grad", "busy", "by_layer", "canonical", "columns",
    "differentiate_batch", "factors", "keyed_generator", "nested_columns", "own_pass", "product", "reduced", "sampled_gradient", "tensors_in",
    "true_columns",
]  # fmt: skip
