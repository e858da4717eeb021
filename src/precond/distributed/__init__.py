"""Who computes what, and the collectives."""

from precond.distributed.collectives import Group, unwrap

__all__ = ["Group", "unwrap"]
