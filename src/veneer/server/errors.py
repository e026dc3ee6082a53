"""Errors that only a server has, the status that each error of the tree becomes, and how it is told."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from veneer.store.files import veneer_home
from veneer.types import AttestationError, RequestError, RunError, StorageError, VeneerError

LOG = logging.getLogger("veneer.server")
Shape = Callable[[int, str, VeneerError | None], Any]
"""From a status, a line and the error itself, if it is one of ours, to a body."""


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


class TooSlow(RequestError):
    """The body did not come."""


class Encoded(RequestError):
    """The body is packed in a way that is not read here."""


class Busy(RunError):
    """Too much is open already: come back in some seconds."""

    def __init__(self, text: str, seconds: float = 1.0) -> None:
        super().__init__(text)
        self.seconds = seconds


STATUS: dict[type[VeneerError], int] = {
    NotFound: 404,
    Gone: 410,
    Refused: 401,
    Forbidden: 403,
    TooLarge: 413,
    TooSlow: 408,
    Encoded: 415,
    Busy: 429,
    StorageError: 507,
    AttestationError: 500,
    RequestError: 400,
    RunError: 500,
}
"""The first kind that fits. Never 409, which clients of the Tinker protocol repeat for minutes."""
UNKNOWN = "the server failed on this request; its log says more"
"""What is told of an error that is none of ours."""
LONGEST = 480
"""Characters of an answer to a mistake."""


def status_of(error: VeneerError) -> int:
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)


def told(error: VeneerError) -> str:
    """An error in one line for a client, who is not to learn where things lie on the server's disk."""
    homes = {str(veneer_home()), str(veneer_home().resolve())}
    own = "|".join(re.escape(home) for home in sorted(homes, key=len, reverse=True))
    return _short(" ".join(re.sub(rf"(?:{own})(?:/[^\s'\",;:()]*)?", "(a file of the server)", str(error)).split()))


def _short(text: str) -> str:
    """What a client sent is quoted, however long it was."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 155]} ... {text[-150:]}"


class Answers:
    """Errors as responses, in the shape of the API that was asked."""

    def __init__(self, shapes: Mapping[str, Shape] | None = None) -> None:
        """``shapes``: by the beginning of the path; ``{"detail": text}`` elsewhere."""
        self.shapes = dict(shapes or {})

    def error(self, scope: Scope, error: VeneerError) -> Response:
        """One that is the server's own stands in its log too, in full."""
        headers, status = dict[str, str](), status_of(error)
        if status >= 500:
            LOG.error("%s", error)
        if isinstance(error, Busy):
            headers["Retry-After"] = str(math.ceil(error.seconds))
        if isinstance(error, Refused):
            headers["WWW-Authenticate"] = 'Bearer realm="veneer"'
        if isinstance(error, TooSlow):
            headers["Connection"] = "close"
        return self.text(scope, status, told(error), headers, error)

    def text(
        self, scope: Scope, status: int, text: str, headers: Mapping[str, str] | None = None, error: VeneerError | None = None
    ) -> Response:
        shape = next((shape for start, shape in self.shapes.items() if scope["path"].startswith(start)), _detail)
        return JSONResponse(shape(status, _short(text), error), status, headers)


def _detail(_status: int, text: str, _error: VeneerError | None) -> Any:
    return {"detail": text}
