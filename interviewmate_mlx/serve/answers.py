"""From a checked request to its answers: all at once, or as they come."""

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from interviewmate_mlx.coach.feedback import Feedback
from interviewmate_mlx.coach.interview import Deck, Practice
from interviewmate_mlx.coach.panel import Voice
from interviewmate_mlx.data.records import Message
from interviewmate_mlx.serve import metrics as metrics_
from interviewmate_mlx.serve.bodies import Generation
from interviewmate_mlx.serve.engine import BusyError, Ended, Engine, Event, Job, TokenChances
from interviewmate_mlx.serve.guard import error_body

log = logging.getLogger("interviewmate_mlx.serve")
_DEFAULT_TOKENS = 256  # of an answer, where a request says nothing
_TICK_S = 0.5  # how often it is looked, while no token comes, whether a client has left
_LOOK_S = 0.02  # and at most how often while they come
_KEEPALIVE_TICKS = 20  # without a token, a stream gets a comment
_RETRY_S = 5
Result = TypeVar("Result")


@dataclass
class Service:
    """What the routes share.

    Attributes:
        engine: answers.
        deck: questions of the mock interview.
        feedback, practice: where things are kept; None: nothing is.
        timeout_s: of a request.
    """

    engine: Engine
    deck: Deck
    feedback: Feedback | None
    practice: Practice | None
    timeout_s: float

    def __post_init__(self) -> None:
        engine = self.engine
        self.metrics = metrics_.Metrics(
            lambda: engine.num_jobs - engine.num_running, lambda: engine.num_running
        )
        # SQLite waits for the disk: not on the loop, and one thing at a time.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")

    async def on_disk(self, step: Callable[..., Result], *arguments: Any) -> Result:
        """Call what reads or writes the file of `--keep`."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, step, *arguments)

    def voice(self, name: str | None) -> Voice:
        """The voice of a request's `model`; by default the first adapter, or the base."""
        voices = self.engine.panel.voices
        if name is None:
            return list(voices.values())[min(1, len(voices) - 1)]
        if name not in voices:
            known = ", ".join(voices)
            text = f"No such model here, expected one of: {known}."
            raise http_error(404, text, "model_not_found", "model")
        return voices[name]


def http_error(
    status: int, message: str, code: str, param: str | None = None, **headers: str
) -> HTTPException:
    return HTTPException(status, error_body(status, message, code, param), headers or None)


@dataclass
class Wanted:
    """What a request asks for.

    Attributes:
        kind: `chatcmpl` or `cmpl`: of OpenAI's two forms.
        voice: who answers.
        prompts: token ids of each.
        body: the request.
        max_tokens: of an answer, as the request says.
        num_likely: log probabilities of so many tokens; None for none at all.
    """

    kind: str
    voice: Voice
    prompts: list[list[int]]
    body: Generation
    max_tokens: int | None
    num_likely: int | None

    def __post_init__(self) -> None:
        self.id = f"{self.kind}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.is_chat = self.kind == "chatcmpl"
        self.num_prompt_tokens = sum(map(len, self.prompts))

    def check_length(self, context: int) -> None:
        """Refuse a prompt that leaves no room for its answer.

        Raises:
            HTTPException: 400.
        """
        longest = max(map(len, self.prompts))
        if longest + (self.max_tokens or 1) > context:
            answer = f" and {self.max_tokens} for the answer" if self.max_tokens else ""
            raise http_error(
                400,
                f"The prompt has {longest} tokens{answer}; the model takes {context} in all.",
                "context_length_exceeded",
                "messages" if self.is_chat else "prompt",
            )

    def jobs(
        self, context: int, deadline: float, deliver: Callable[[int, Event], None]
    ) -> list[Job]:
        """A job for each choice of each prompt, with a seed of its own."""
        seed = secrets.randbits(31)
        jobs: list[Job] = []
        for prompt in self.prompts:
            room = context - len(prompt)
            sampling = self.body.sampling(self.max_tokens or min(_DEFAULT_TOKENS, room), seed)
            for choice in range(self.body.num_choices):
                index = len(jobs)
                jobs.append(
                    Job(
                        self.voice,
                        prompt,
                        replace(sampling, seed=(sampling.seed + choice) % 2**32),
                        partial(deliver, index),
                        deadline,
                        self.num_likely,
                        keeps_space=not self.is_chat,
                    )
                )
        return jobs

    def usage(self, num_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": self.num_prompt_tokens + num_tokens,
        }

    def whole(self, answers: Sequence["Answer"]) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        choices = []
        for index, answer in enumerate(answers):
            said: dict[str, Any] = {"text": answer.text}
            if self.is_chat:
                message = {"role": "assistant", "content": answer.text, "refusal": None}
                said = {"message": message}
            choices.append(
                {
                    "index": index,
                    **said,
                    "logprobs": self._logprobs(answer.chances, 0),
                    "finish_reason": answer.reason,
                }
            )
        kind = "chat.completion" if self.is_chat else "text_completion"
        usage = self.usage(sum(answer.num_tokens for answer in answers))
        return self._head(kind) | {"choices": choices, "usage": usage}

    def part(
        self,
        index: int,
        text: str | None,
        offset: int = 0,
        chances: TokenChances | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        """Part of a streamed answer.

        Args:
            index: of the choice.
            text: that comes next; None for the part that comes before all text.
            offset: characters of the text before.
            chances: of the token.
            reason: why it ends here.
        """
        said: dict[str, Any] = {"text": text or ""}
        if self.is_chat:
            delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
            said = {"delta": {} if reason and not text else delta}
        logprobs = self._logprobs([chances] if chances else [], offset) if chances else None
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self.body.wants_usage else {}
        return self._part_head() | {"choices": [choice]} | usage

    def last_part(self, num_tokens: int) -> dict[str, Any]:
        """The part with the usage, after all others."""
        return self._part_head() | {"choices": [], "usage": self.usage(num_tokens)}

    def _part_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.is_chat else "text_completion")

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.voice.name,
        }

    def _logprobs(self, chances: Sequence[TokenChances], offset: int) -> dict[str, Any] | None:
        if self.num_likely is None:
            return None
        if self.is_chat:
            return {"content": [_chat_logprob(each) for each in chances], "refusal": None}
        offsets = []
        for each in chances:
            offsets.append(offset)
            offset += len(each.text)
        return {
            "tokens": [each.text for each in chances],
            "token_logprobs": [each.logprob for each in chances],
            "top_logprobs": [dict(each.others) for each in chances],
            "text_offset": offsets,
        }


def _chat_logprob(chances: TokenChances) -> dict[str, Any]:
    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    others = [entry(*other) for other in chances.others]
    return entry(chances.text, chances.logprob) | {"top_logprobs": others}


@dataclass
class Answer:
    """What has come of an answer so far."""

    job: Job
    text: str = ""
    chances: list[TokenChances] = field(default_factory=list)
    reason: str = ""
    num_tokens: int = 0


class LeftError(Exception):
    """The client has closed the connection."""


async def respond(
    service: Service, wanted: Wanted, request: Request, messages: Sequence[Message] = ()
) -> Response:
    """Answer a request, and keep a conversation's answers if that is asked for.

    Raises:
        HTTPException: too many requests wait (429), it took too long (504), or it cannot be
            answered.
    """
    engine, loop = service.engine, asyncio.get_running_loop()
    context = engine.panel.context
    wanted.check_length(context)
    inbox: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def deliver(index: int, event: Event) -> None:
        with suppress(RuntimeError):  # the loop has closed
            loop.call_soon_threadsafe(inbox.put_nowait, (index, event))

    jobs = wanted.jobs(context, time.monotonic() + service.timeout_s, deliver)
    facts = request.state.facts = {"adapter": wanted.voice.name}
    try:
        engine.submit(jobs)
    except BusyError:
        text = "As many requests wait as may. Try again later."
        raise http_error(429, text, "too_many_requests", **{"Retry-After": str(_RETRY_S)}) from None
    answers = [Answer(job) for job in jobs]
    came = _Came(service, wanted, request, answers, inbox, facts)
    if wanted.body.stream:
        parts = _as_events(came, messages)
        return StreamingResponse(parts, media_type="text/event-stream")
    try:
        async with aclosing(came.events()) as events:
            async for _ in events:
                pass
    except LeftError:
        return Response(status_code=499)  # nobody reads it but the log
    reasons = {answer.reason for answer in answers}
    if "error" in reasons:
        raise http_error(500, "The server has failed.", "internal_error")
    if "timeout" in reasons:
        raise http_error(504, f"It took longer than {service.timeout_s:g} s.", "timeout")
    await _keep(came, messages)
    return JSONResponse(wanted.whole(answers))


class _Came:
    """The events of a request, each after it was added to its answer."""

    def __init__(
        self,
        service: Service,
        wanted: Wanted,
        request: Request,
        answers: list[Answer],
        inbox: "asyncio.Queue[tuple[int, Event]]",
        facts: dict[str, Any],
    ) -> None:
        self.service, self.wanted, self.answers = service, wanted, answers
        self._request, self._inbox, self._facts = request, inbox, facts

    async def events(self) -> AsyncGenerator[tuple[int, Event] | None, None]:
        """Each event with the index of its answer; None where none came for a while.

        Raises:
            LeftError: the client has closed the connection.
        """
        started = looked = time.monotonic()
        first_s = None
        try:
            while not all(answer.reason for answer in self.answers):
                found = None
                with suppress(TimeoutError):
                    found = await asyncio.wait_for(self._inbox.get(), _TICK_S)
                now = time.monotonic()
                if found is None or now - looked > _LOOK_S:
                    looked = now
                    if await self._request.is_disconnected():
                        raise LeftError
                if found:
                    first_s = now - started if first_s is None else first_s
                    self._add(*found)
                yield found
        finally:
            self._finish(first_s, time.monotonic() - started)

    def _add(self, index: int, event: Event) -> None:
        answer = self.answers[index]
        if isinstance(event, Ended):
            answer.reason, answer.num_tokens = event.reason, event.num_tokens
            return
        answer.text += event.text
        answer.chances += [event.chances] if event.chances else []

    def _finish(self, first_s: float | None, total_s: float) -> None:
        """Free the places of what has not ended, and count."""
        for answer in self.answers:
            if not answer.reason:
                self.service.engine.cancel(answer.job)
                answer.num_tokens = answer.job.num_tokens
        metrics, name = self.service.metrics, self.wanted.voice.name
        num_tokens = sum(answer.num_tokens for answer in self.answers)
        metrics.prompt_tokens.labels(name).inc(self.wanted.num_prompt_tokens)
        metrics.answer_tokens.labels(name).inc(num_tokens)
        self._facts |= {"prompt": self.wanted.num_prompt_tokens, "tokens": num_tokens}
        if first_s is not None:
            metrics.first_token.labels(name).observe(first_s)
            self._facts["first"] = f"{first_s:.3f}s"
            longest = max(answer.num_tokens for answer in self.answers)
            if longest > 1:
                metrics.token.labels(name).observe((total_s - first_s) / (longest - 1))
        reasons = {answer.reason or "left" for answer in self.answers}
        self._facts["end"] = ",".join(sorted(reasons))


async def _as_events(came: _Came, messages: Sequence[Message]) -> AsyncIterator[bytes]:
    """An answer as server-sent events."""
    wanted, answers = came.wanted, came.answers
    if wanted.is_chat:
        for index in range(len(answers)):
            yield _event(wanted.part(index, None))
    ticks = 0
    async with aclosing(came.events()) as events:
        async for found in events:
            ticks = 0 if found else ticks + 1
            if ticks and ticks % _KEEPALIVE_TICKS == 0:
                yield b": still at it\n\n"
            if found is None:
                continue
            index, event = found
            if not isinstance(event, Ended):
                offset = len(answers[index].text) - len(event.text)
                yield _event(wanted.part(index, event.text, offset, event.chances))
            elif event.reason in ("timeout", "error"):
                is_late = event.reason == "timeout"
                text = f"It took longer than {came.service.timeout_s:g} s."
                text = text if is_late else "The server has failed."
                status = 504 if is_late else 500
                yield _event(error_body(status, text, "timeout" if is_late else "internal_error"))
                return
            else:
                yield _event(wanted.part(index, "", reason=event.reason))
    # Before the end is told: who has read that may rate the answer.
    await _keep(came, messages)
    if wanted.body.wants_usage:
        yield _event(wanted.last_part(sum(answer.num_tokens for answer in answers)))
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


async def _keep(came: _Came, messages: Sequence[Message]) -> None:
    """Keep the answers to a conversation, where that is asked for."""
    feedback = came.service.feedback
    if feedback is None or not messages:
        return
    voice, category = came.wanted.voice, came.service.deck.category_of(messages[-1].content)
    for index, answer in enumerate(came.answers):
        answer_id = f"{came.wanted.id}-{index}" if index else came.wanted.id
        said = (answer_id, messages, answer.text, voice.name, voice.adapter_hash, category)
        try:
            await came.service.on_disk(feedback.keep, *said)
        except Exception:  # the answer is more to its reader than a full disk
            log.exception("an answer could not be kept")
