"""The errors a user meets, each a sentence that says what to do."""

from __future__ import annotations


class PrecondError(Exception):
    """Base class of every error this library raises on purpose."""


class UnknownName(PrecondError, KeyError):
    """A name that is in no registry; the message lists the names there are and the closest."""

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return str(self.args[0])


class InvalidCombination(PrecondError, ValueError):
    """A cell (matrix, representation, solver) that has no meaning; the message gives the reason and the nearest valid choice."""


class NeedsTrajectory(PrecondError, ValueError):
    """A matrix that has no value from one batch was asked for one."""


class ObservationError(PrecondError, RuntimeError):
    """What was seen during the forward and backward pass cannot give the right matrix."""


class UsageError(PrecondError, RuntimeError):
    """A call out of order: `step()` before `attach()`, twice for one backward pass, ..."""


class SolverFailure(PrecondError, ArithmeticError):
    """A solver could not invert an operator (singular, indefinite, not finite, no convergence)."""


class RefreshFailure(PrecondError, RuntimeError):
    """A block could not be refreshed for too many consecutive refreshes; names block, triple, shapes and what to try."""
