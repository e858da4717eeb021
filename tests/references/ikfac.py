"""IKFAC (Lin et al. 2024): K-FAC's factors in inverse-free form; see `references.ingd`."""

from __future__ import annotations

from typing import Any

from references import ingd

NETS = ("mlp", "conv")
VARIANTS: dict[str, Any] = {
    "default": ({}, {}),
    "released": (
        {"curvature_interval": 3, "solver_interval": 3, "solver": {"step": 1e-2}, "damping": {"value": 1e-3}},
        {"interval": 3, "step": 1e-2, "damping": 1e-3},
    ),
    "lower": ({"solver": {"group": "lower"}}, {"group": "lower"}),
    "diagonal": ({"solver": {"group": "diagonal"}}, {"group": "diagonal"}),
    "fisher": ({"matrix": "fisher_mc"}, {"sampled": True}),
}
ONLY = {"lower": ("mlp",), "diagonal": ("conv",), "fisher": ("mlp",)}
STEPS = 8
TOLERANCE = 1e-10
CONTROLS = ({"step": 0.09}, {"damping": 2e-2}, {"method": "ingd"}, {"early": True})


def train(*arguments: Any, **options: Any) -> Any:
    return ingd.train(*arguments, **({"method": "ikfac", "damping": 1e-2, "lr": 3e-3} | options))
