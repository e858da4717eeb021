"""The package is imported before pytest collects the doctests of one of its files, which would otherwise be run a second time."""

import precond  # noqa: F401
