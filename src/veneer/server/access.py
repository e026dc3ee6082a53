"""Who is calling."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from starlette.requests import HTTPConnection


@dataclass(frozen=True)
class Caller:
    """The holder of a key, or everybody on the loopback of a server without keys."""

    name: str
    adapters: tuple[str, ...] = ("*",)
    """Patterns of the registry's adapters that the caller may see."""

    def sees(self, adapter: str) -> bool:
        """Whether an adapter of that name in the registry is there for the caller."""
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)


LOCAL = Caller("local")


def caller_of(connection: HTTPConnection) -> Caller:
    """Whom the access check found."""
    return connection.scope.get("veneer.caller", LOCAL)
