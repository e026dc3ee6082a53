"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError

from veneer.server.errors import NotFound
from veneer.types import RequestError, VeneerError

PREFIX = "/v1/"
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class FieldError(RequestError):
    """A field of the request is wrong."""

    def __init__(self, text: str, param: str, code: str | None = None) -> None:
        super().__init__(text)
        self.param, self.code = param, code


class UnknownModel(NotFound):
    """No base and no adapter of that name that the caller may see."""

    def __init__(self, text: str, param: str = "model") -> None:
        super().__init__(text)
        self.param, self.code = param, "model_not_found"


def field_error(invalid: RequestValidationError) -> FieldError:
    """The first field that does not validate, in one line."""
    first = invalid.errors()[0]
    where = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "list[", "constrained-"))]
    param = ".".join(where[1:])
    unknown = first["type"] == "extra_forbidden"
    what = "there is no such parameter on this server" if unknown else first["msg"].removeprefix("Value error, ")
    return FieldError(f"{param or 'the body'}: {what}", param or where[0])


def error_body(status: int, text: str, error: VeneerError | None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    fields = {"param": getattr(error, "param", None), "code": getattr(error, "code", None)} if isinstance(error, RequestError) else {}
    return {"error": {"message": text, "type": kind, "param": None, "code": None, **fields}}
