"""TONGA (Le Roux, Manzagol & Bengio 2007) with a matrix C_o of its own for the row o of [W, b]; otherwise as `tonga`."""

from __future__ import annotations

import functools

from references import tonga

NETS = ("mlp", "conv")
_SMALL, _COLUMNS = {"rank": 2, "gather": 4}, {"rank": 2, "gather": 2}
VARIANTS = {
    "default": ({}, {}),
    "small": ({"repr": _SMALL}, {"k": 2, "b": 4}),
    "one_gradient": ({"matrix": "batched_empirical_fisher", "repr": _COLUMNS}, {"matrix": "batch", "k": 2, "b": 2}),
    "normalised": ({"history": {"name": "Ema", "beta": 0.9}}, {"normalised": True, "gamma": 0.9}),
}
ONLY = {"small": ("conv",), "normalised": ("mlp",)}
STEPS = 9
TOLERANCE = 1e-10
CONTROLS = ({"k": 4}, {"b": 20}, {"gamma": 0.99}, {"matrix": "batch"}, {"units": False})

train = functools.partial(tonga.train, damping=0.01, lr=0.1, units=True)
