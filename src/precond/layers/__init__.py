"""One file a layer family, and the generic rule for every other module."""

from __future__ import annotations

from torch import nn

from precond.layers import conv, embedding, linear, norm  # noqa: F401  (their decorators register the rules)
from precond.layers.base import ROW_LAYOUTS, OneHot, Rows, Rule, check_examples, find_rule, rule_for
from precond.layers.generic import Generic

__all__ = ["GENERIC", "ROW_LAYOUTS", "Generic", "OneHot", "Rows", "Rule", "check_examples", "resolve_rule", "rule_for"]

GENERIC = Generic()


def resolve_rule(module: nn.Module) -> Rule:
    """The rule of a module: its family's, else the generic one."""
    return find_rule(module) or GENERIC
