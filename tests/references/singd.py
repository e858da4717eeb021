"""SINGD (Lin et al. 2024): INGD whose roots stay in a group; see `references.ingd`. The default's blocks of 30 are whole factors here."""

from __future__ import annotations

from typing import Any

from references import ingd

NETS = ("mlp", "conv")
_REDUCED: dict[str, Any] = {"matrix": "fisher_mc", "repr": {"sharing": "reduce"}}
VARIANTS: dict[str, Any] = {
    "default": ({}, {}),
    "blocks_of_2": ({"solver": {"block": 2}}, {"block": 2}),
    "diagonal": ({"solver": {"group": "diagonal"}}, {"group": "diagonal"}),
    "lower": ({"solver": {"group": "lower"}}, {"group": "lower"}),
    "upper": ({"solver": {"group": "upper"}}, {"group": "upper"}),
    "sampled_reduced": (_REDUCED, {"sampled": True, "reduce": True}),
}
ONLY = {"blocks_of_2": ("mlp",), "upper": ("mlp",), "sampled_reduced": ("conv",)}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"block": 4}, {"group": "lower"}, {"damping": 2e-4}, {"reduce": True, "interval": 2})


def train(*arguments: Any, **options: Any) -> Any:
    return ingd.train(*arguments, **({"group": "block"} | options))
