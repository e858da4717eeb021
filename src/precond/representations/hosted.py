"""What a representation becomes over some kinds of observation, or with some options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from precond.blocks import Scope
from precond.representations.base import Representation


class Host(Protocol):
    """The member of the registry that a user named."""

    @property
    def name(self) -> str: ...
    @property
    def scope(self) -> Scope: ...


@dataclass(frozen=True, kw_only=True)
class Hosted(Representation):
    """A form of its own that goes by the name and the scope of its host."""

    host: Host

    @property
    def name(self) -> str:  # type: ignore[override]  # the registry gave the host its name
        return self.host.name

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return self.host.scope
