"""Errors that only a server has, and the status that each error of the tree becomes."""

from __future__ import annotations

from veneer.types import AttestationError, RequestError, RunError, StorageError, VeneerError


class NotFound(RequestError):
    """There is nothing of that name that the caller may see."""


class Gone(RequestError):
    """It was here, and is over."""


class Refused(RequestError):
    """No key, or a wrong one."""


class Forbidden(RequestError):
    """The key does not allow it."""


class TooLarge(RequestError):
    """The body is beyond the limit."""


class Busy(RunError):
    """Too much is open already: come back in a second."""


STATUS: dict[type[VeneerError], int] = {
    NotFound: 404,
    Gone: 410,
    Refused: 401,
    Forbidden: 403,
    TooLarge: 413,
    Busy: 429,
    StorageError: 507,
    AttestationError: 500,
    RequestError: 400,
    RunError: 500,
}
"""The first kind that fits. Never 409, which clients of the Tinker protocol repeat for minutes."""


def status_of(error: VeneerError) -> int:
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
