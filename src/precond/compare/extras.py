"""Optional packages, imported where they are used and missed in one sentence."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from precond.errors import PrecondError


class MissingPackage(PrecondError, ImportError):
    """A package that only `precond compare` needs is not installed; the message says how to get it."""


def need(module: str, *, package: str, purpose: str) -> Any:
    """Import `module`, or say in one sentence which package is missing and what it is for."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingPackage(f"{package} is needed {purpose}: pip install 'precond[demo]' (or pip install {package}).") from error
