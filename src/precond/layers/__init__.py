"""How layers are seen: one file a family, the generic rule for every other module, and `register` for a rule of your own.

A rule turns one call of a layer, its input a and the columns g at its output, into gradients by example.
"""

from __future__ import annotations

from precond.layers import activation, attention, conv, embedding, linear, norm  # noqa: F401  (their decorators register the rules)
from precond.layers.base import ROW_LAYOUTS, OneHot, Piece, Ragged, Rows, Rule, counts_up, layer_grad, layer_input
from precond.layers.generic import Generic
from precond.layers.linear import LinearRule
from precond.layers.registration import GENERIC, register, resolve_rule

__all__ = [
    "GENERIC", "ROW_LAYOUTS", "Generic", "LinearRule", "OneHot", "Piece", "Ragged", "Rows", "Rule", "counts_up", "layer_grad", "layer_input", "register",
    "resolve_rule",
]  # fmt: skip
