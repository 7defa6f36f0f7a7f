"""Errors as OpenAI's clients expect them: a status, and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from fluxc.errors import ContextError, PlanError, UserError

RETRY_SECONDS = 1


class ApiError(Exception):
    """An answer that is an error. `retry_after`: seconds after which asking again may help."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        # A lone surrogate out of the request must not keep its own error from being written.
        text = self.message.encode("utf-8", "replace").decode()
        param = None if self.param is None else self.param.encode("utf-8", "replace").decode()
        return {"error": {"message": text, "type": self.kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


class ErrorDetail(BaseModel):
    """What went wrong, which parameter is at fault, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


def of_user(fault: UserError, param: str | None = None) -> ApiError:
    """A fault of fluxc in what the client asked for: 400, with the engine's own words."""
    code = "context_length_exceeded" if isinstance(fault, ContextError) else None
    return ApiError(400, str(fault), param="budget" if isinstance(fault, PlanError) else param, code=code)


def overloaded(seconds: int) -> ApiError:
    """The queue is full: 429."""
    text = f"the server has as many requests as it can queue; try again in {seconds} s"
    return ApiError(429, text, kind="rate_limit_error", code="queue_full", retry_after=seconds)


def draining() -> ApiError:
    """The server is shutting down: 503, to be asked again of another replica or later."""
    text = "the server is shutting down; try again"
    return ApiError(503, text, kind="server_error", code="shutting_down", retry_after=RETRY_SECONDS)


def internal() -> ApiError:
    """Our own fault: 500; the log says more."""
    return ApiError(500, "the server failed on this request; its log says why", kind="server_error", code="internal")
