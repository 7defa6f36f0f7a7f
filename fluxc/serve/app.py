"""The FastAPI app: OpenAI's routes over one engine, `/health` and `/metrics`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response

from fluxc import __version__
from fluxc.engine.engine import Engine
from fluxc.serve import ask, documents
from fluxc.serve.answering import Answering
from fluxc.serve.body import BodyLimits
from fluxc.serve.documents import answers, errors
from fluxc.serve.errors import ApiError, internal
from fluxc.serve.forms import Chat, Completions, Envelope, Form
from fluxc.serve.front import Front
from fluxc.serve.invalid import of_validation
from fluxc.serve.keys import ApiKeys
from fluxc.serve.options import ServeOptions
from fluxc.serve.schema import ChatRequest, CompletionRequest
from fluxc.serve.service import Service

Session = Annotated[str | None, Header(min_length=1, max_length=256)]


def create_app(engine: Engine, settings: ServeOptions | None = None) -> FastAPI:
    """The app over an engine, which it closes when it shuts down. `app.state.service` is its Service.

    Raises OptionError for a file of API keys that cannot be used.
    """
    chosen = settings or ServeOptions(engine="model")
    service = Service(engine, chosen)
    app = FastAPI(
        title="fluxc",
        version=__version__,
        description="OpenAI-compatible answers of a model whose layers choose between full and sparse attention",
        middleware=[
            Middleware(Front, service.gate, ApiKeys.read(chosen.api_keys), service.metrics),
            Middleware(BodyLimits, chosen.max_body_bytes, chosen.max_json_depth, chosen.body_seconds),
        ],
        lifespan=_lifespan,
    )
    app.state.service = service
    _add_errors(app)
    _add_state(app, service)
    _add_models(app, chosen.model)
    _add_answers(app, service)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.service.close()


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(request: Request, fault: ApiError) -> Response:
        request.scope.get("fluxc", {})["error"] = fault.code or fault.kind
        return fault.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, fault: RequestValidationError) -> Response:
        return await known(request, of_validation(fault))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, fault: HTTPException) -> Response:
        made = ApiError(fault.status_code, str(fault.detail), code="not_found" if fault.status_code == 404 else None)
        return JSONResponse(made.body, made.status, fault.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, fault: Exception) -> Response:
        return internal().response()


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses={200: {"model": documents.Health}, 503: {"model": documents.Health}})
    async def health() -> Response:
        """Whether requests are taken."""
        state, status = service.engine.status, "draining" if service.gate.draining else "ok"
        found = {"status": status, "running": state.running, "waiting": state.waiting, "server": service.id}
        return JSONResponse(found, 200 if status == "ok" else 503)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """Prometheus' page."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_models(app: FastAPI, name: str) -> None:
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "fluxc"}

    @app.get("/v1/models", responses={200: {"model": documents.Models}, **errors(401, 503)})
    async def models() -> Response:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{model_id:path}", responses={200: {"model": documents.Model}, **errors(401, 404, 503)})
    async def one_model(model_id: str) -> Response:
        """One model by its name."""
        _check_model(model_id, name)
        return JSONResponse(model)


def _add_answers(app: FastAPI, service: Service) -> None:
    settings = service.settings

    @app.post("/v1/completions", responses=answers(documents.CompletionAnswer))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        _check_model(body.model, settings.model)
        envelope = _envelope(service, Completions(service.text_of, body.logprobs), body.budget)
        answering = Answering(service, request, ask.of_completion(body, settings), envelope)
        return await (answering.stream(body.usage_wanted) if body.stream else answering.whole())

    @app.post("/v1/chat/completions", responses=answers(documents.ChatAnswer))
    async def chat(body: ChatRequest, request: Request, x_session_id: Session = None) -> Response:
        """Answer a conversation.

        Requests with the same `x-session-id` are turns of one conversation: its cache is kept between them, and
        replicas are chosen by it.
        """
        _check_model(body.model, settings.model)
        if x_session_id is not None and body.choices > 1:
            raise ApiError(400, "a session takes one answer at a time: n is 1", param="n")
        asks = ask.of_chat(body, settings)
        envelope = _envelope(service, Chat(service.text_of, asks[0].logprobs), body.budget)
        answering = Answering(service, request, asks, envelope, x_session_id)
        return await (answering.stream(body.usage_wanted) if body.stream else answering.whole())


def _envelope(service: Service, form: Form, budget: float | None) -> Envelope:
    plan = service.engine.plan
    return Envelope(form, service.settings.model, plan.digest()[:12], plan.budget if budget is None else budget)


def _check_model(asked: str, name: str) -> None:
    if asked != name:
        text = f"the model {asked!r} does not exist; this server has {name!r}"
        raise ApiError(404, text, param="model", code="model_not_found")
