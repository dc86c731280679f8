"""The routes: OpenAI's, the mock interview's, feedback, metrics, and the page."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from interviewmate_mlx import __version__
from interviewmate_mlx.coach.interview import Question
from interviewmate_mlx.coach.panel import Voice
from interviewmate_mlx.coach.points import Point
from interviewmate_mlx.data.prompts import encode_prompt
from interviewmate_mlx.data.records import Message
from interviewmate_mlx.data.templates import VERBATIM
from interviewmate_mlx.errors import ConfigError, DataError, ModelError
from interviewmate_mlx.serve import metrics as metrics_
from interviewmate_mlx.serve.answers import Service, Wanted, http_error, log, respond
from interviewmate_mlx.serve.bodies import (
    ChatBody,
    CompareBody,
    CompletionBody,
    GradeBody,
    RatingBody,
)
from interviewmate_mlx.serve.guard import error_body

_PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_MAX_QUESTIONS = 100


def make_app(service: Service) -> FastAPI:
    """The application, without its guard."""
    errors = {400: "not valid, or not supported", 401: "no API key", 403: "from elsewhere"}
    errors |= {404: "no such model", 405: "another method", 408: "the body came too slowly"}
    errors |= {409: "nothing is kept", 413: "too large", 415: "not JSON", 429: "too many requests"}
    errors |= {500: "our fault", 503: "nothing can be kept", 504: "took too long"}
    app = FastAPI(
        title="InterviewMate",
        version=__version__,
        docs_url=None,  # it would load scripts from elsewhere
        redoc_url=None,
        responses={code: {"description": text} for code, text in errors.items()},
    )
    _add_error_forms(app)
    _add_page(app)
    _add_state(app, service)
    _add_openai(app, service)
    _add_feedback(app, service)
    _add_interview(app, service)
    return app


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Is the server there?"""
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Numbers since the start, in Prometheus' form."""
        return Response(service.metrics.text(), media_type=metrics_.CONTENT_TYPE)


def _add_openai(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The base and each adapter."""
        return {
            "object": "list",
            "data": [
                {"id": voice.name, "object": "model", "created": 0, "owned_by": _owner(voice)}
                for voice in service.engine.panel.voices.values()
            ],
        }

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Any:
        """Answer a conversation."""
        voice = service.voice(body.model)
        roles = {"developer": "system"}
        messages = [Message(roles.get(m.role, m.role), m.text) for m in body.messages]
        try:
            # In a thread: a megabyte of text takes a second.
            prompt = await asyncio.to_thread(voice.prompt, service.engine.panel.tokenizer, messages)
        except (ConfigError, DataError, ModelError) as error:
            raise http_error(400, str(error), "not_supported", "messages") from error
        num_likely = (body.top_logprobs or 0) if body.logprobs else None
        most = body.max_completion_tokens or body.max_tokens
        wanted = Wanted("chatcmpl", voice, [prompt], body, most, num_likely)
        return await respond(service, wanted, request, messages)

    @app.post("/v1/completions")
    async def complete(body: CompletionBody, request: Request) -> Any:
        """Go on from texts as they stand."""
        voice = service.voice(body.model)
        tokenizer = service.engine.panel.tokenizer
        prompts = [
            await asyncio.to_thread(encode_prompt, tokenizer, text, VERBATIM)
            for text in body.prompts
        ]
        wanted = Wanted("cmpl", voice, prompts, body, body.max_tokens, body.logprobs)
        return await respond(service, wanted, request)


def _add_feedback(app: FastAPI, service: Service) -> None:
    @app.post("/feedback")
    async def rate(body: RatingBody) -> dict[str, str]:
        """Keep what a user says of an answer."""
        if service.feedback is None:
            raise _not_kept()
        try:
            voice = await service.on_disk(
                service.feedback.rate, body.answer, body.thumbs, body.better
            )
        except Exception as error:
            raise _cannot_keep() from error
        if voice is None:
            raise http_error(404, "No such answer is kept.", "answer_not_found", "answer")
        if body.thumbs:
            service.metrics.ratings.labels(voice, body.thumbs).inc()
        return {"status": "kept"}


def _add_interview(app: FastAPI, service: Service) -> None:
    @app.get("/interview/questions")
    async def questions(
        category: str = "", difficulty: str = "", count: int = 10
    ) -> dict[str, Any]:
        """The next questions of the mock interview."""
        if not 1 <= count <= _MAX_QUESTIONS:
            text = f"count: expected from 1 to {_MAX_QUESTIONS}."
            raise http_error(400, text, "invalid_value", "count")
        try:
            chosen = service.deck.choose(category, difficulty)
        except ConfigError as error:
            raise http_error(400, str(error), "invalid_value", "category") from error
        if service.practice:
            chosen = await service.on_disk(service.practice.next_questions, chosen, count)
        else:
            secrets.SystemRandom().shuffle(chosen)
        categories = sorted({q.category for q in service.deck.questions.values()} - {""})
        return {
            "categories": categories,
            "keeps": service.practice is not None,
            "questions": [_asked(question) for question in chosen[:count]],
        }

    @app.post("/interview/compare")
    async def compare(body: CompareBody) -> dict[str, Any]:
        """The points of the written answer that an answer has, by the words that they share."""
        question = _question(service, body.question)
        points = service.deck.compare(question, body.answer)
        return {
            "points": [_as_json(point) for point in points],
            "reference": question.reference,
            "follow_up": question.follow_up,
        }

    @app.post("/interview/grade")
    async def grade(body: GradeBody) -> dict[str, str]:
        """Keep a grade; tell when the question is due again."""
        question = _question(service, body.question)
        if service.practice is None:
            raise _not_kept()
        points = service.deck.compare(question, body.answer)
        try:
            due = await service.on_disk(
                service.practice.grade,
                *(question, body.answer, points, body.as_grade(), body.follow_up),
            )
        except Exception as error:
            raise _cannot_keep() from error
        return {"due": due.isoformat()}


def _add_page(app: FastAPI) -> None:
    for path, (name, kind) in _FILES.items():
        route = _file_route((_PAGE / name).read_bytes(), kind)
        app.add_route(path, route, methods=["GET"], include_in_schema=False)


def _file_route(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(_: Request) -> Response:
        return Response(content, media_type=kind)

    return send


def _add_error_forms(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(RequestValidationError)
    async def not_valid(_: Request, error: RequestValidationError) -> JSONResponse:
        faults = [_fault(each) for each in error.errors()]
        text = "; ".join(text for _, text in faults[:10])
        return JSONResponse(error_body(400, text, "invalid_value", faults[0][0] or None), 400)

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        detail: Any = error.detail
        if not isinstance(detail, dict):
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
            detail = error_body(error.status_code, str(detail), code)
        return JSONResponse(detail, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return JSONResponse(error_body(500, "The server has failed.", "internal_error"), 500)


def _fault(error: Any) -> tuple[str, str]:
    """The name of what is wrong, and the fault in words, without what was given."""
    # Without where it was looked for, and without the kinds among which one was tried.
    parts = [str(part) for part in error["loc"] if part not in ("body", "query", "str")]
    place = ".".join(part for part in parts if part.isidentifier() or part.isdecimal())
    text = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        text = "not supported here"
    elif error["type"] == "json_invalid":
        return "", f"The body is not JSON: {error.get('ctx', {}).get('error', '')}"
    return place, f"{place}: {text}" if place else text


def _not_kept() -> HTTPException:
    return http_error(409, "This server keeps nothing: start it with --keep FILE.", "nothing_kept")


def _cannot_keep() -> HTTPException:
    log.exception("what was said could not be kept")
    return http_error(503, "It could not be kept; the server's log says why.", "cannot_keep")


def _question(service: Service, question_id: str) -> Question:
    try:
        return service.deck.questions[question_id]
    except KeyError:
        raise http_error(404, "No such question.", "question_not_found", "question") from None


def _asked(question: Question) -> dict[str, str]:
    keys = ("id", "text", "category", "difficulty")
    return {key: getattr(question, key) for key in keys}


def _as_json(point: Point) -> dict[str, Any]:
    return asdict(point) | {"is_covered": point.is_covered}


def _owner(voice: Voice) -> str:
    return "adapter" if voice.number else "base"
