"""What a service answers where it refuses: a status, a code for programs, a reason for people."""

import json
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

LONGEST = 500  # characters of a message: an id that is quoted may be as long as the body


class Refused(HTTPException):
    """
    An answer with a reason.

    Args:
        status: HTTP status.
        code: The reason for programs, such as `"queue_full"`.
        message: What was given, what is allowed, what to do.
        retry_after: Seconds after which the same request may succeed.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None):
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.code = code

    def response(self) -> Response:
        """As it is sent."""
        return json_response({"error": {"code": self.code, "message": self.detail}}, self.status_code, self.headers)


def json_response(content: Any, status: int = 200, headers: Any = None) -> Response:
    """ASCII alone: half a surrogate pair in an id cannot be written as UTF-8."""
    body = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(body, status, headers, media_type="application/json")


def reason(error: BaseException) -> str:
    """The message of an error, in a line of bounded length; a KeyError shows its message in quotes."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = text or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, Refused):
        request.scope["onerec_code"] = error.code
        return error.response()
    assert isinstance(error, HTTPException)
    known = {404: ("unknown_path", "there is no such path here; GET /docs lists them."), 405: ("method", None)}
    code, message = known.get(error.status_code, ("http", None))
    refused = Refused(error.status_code, code, message or str(error.detail))
    refused.headers = error.headers or {}
    return refused.response()


async def _invalid(request: Request, error: Exception) -> Response:
    """Where and why, not what: histories do not come back in answers that a proxy may log."""
    assert isinstance(error, RequestValidationError)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what else a browser may send to this machine from any page is not even read
        request.scope["onerec_code"] = "content_type"
        what = f"content-type is {kind[:80]!r}: send the header `content-type: application/json`, and JSON."
        return Refused(415, "content_type", what).response()
    found = []
    for one in error.errors()[:5]:
        place = ".".join(str(part) for part in one["loc"] if part != "body")
        found.append(f"{place[:80] or 'the body'}: {one['msg']}")
    request.scope["onerec_code"] = "invalid_request"
    message = reason(ValueError("; ".join(found)))
    return Refused(422, "invalid_request", f"{message}. GET /docs shows what is allowed.").response()


def add_handlers(app: FastAPI) -> None:
    """Every refusal of the application has the form of [`Refused`]."""
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)


__all__ = ["Refused", "add_handlers", "json_response", "reason"]
