"""Answers requests side by side, on one thread: all that uses the model is in it."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator

from interviewmate_mlx.coach.generate import num_at_once
from interviewmate_mlx.coach.panel import Panel, Voice
from interviewmate_mlx.coach.sampling import (
    Sampling,
    StopTexts,
    make_processors,
    make_sampler,
    surplus_ids,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenChances:
    """A token that was drawn, and how likely it and others were.

    Attributes:
        text: of the token.
        logprob: its log probability.
        others: texts and log probabilities of the likeliest tokens, the likeliest first.
    """

    text: str
    logprob: float
    others: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next part of an answer; its text may be empty, while more is needed to show it."""

    text: str
    chances: TokenChances | None = None


@dataclass(frozen=True)
class Ended:
    """The end of an answer.

    Attributes:
        reason: `stop`, `length`, `timeout`, or `error`.
        num_tokens: that were generated.
    """

    reason: str
    num_tokens: int


Event: TypeAlias = Piece | Ended


class BusyError(Exception):
    """As many requests wait as may."""


@dataclass
class Job:
    """One answer that is wanted.

    Attributes:
        voice: whose.
        prompt: token ids.
        sampling: how tokens are drawn.
        deliver: called with each event, on the engine's thread; must not block.
        deadline: on the clock of `time.monotonic`.
        num_likely: log probabilities of so many tokens are wanted; None for none at all.
        keeps_space: whether the text keeps the space that it begins with.
    """

    voice: Voice
    prompt: list[int]
    sampling: Sampling
    deliver: Callable[[Event], None]
    deadline: float
    num_likely: int | None = None
    keeps_space: bool = False
    num_tokens: int = 0
    stops: StopTexts = field(init=False)
    detokenizer: Any = None
    has_begun: bool = False

    def __post_init__(self) -> None:
        self.stops = StopTexts(self.sampling.stop)
        self.has_begun = self.keeps_space


class Engine:
    """A thread that answers jobs in batches, each from the token on at which it comes.

    A context manager: when the block has ended, all jobs are done.
    """

    def __init__(self, panel: Panel, max_waiting: int) -> None:
        """
        Args:
            panel: the model and its voices.
            max_waiting: jobs beyond those that are answered side by side.
        """
        self.panel = panel
        self.max_running = num_at_once(panel.model.network, panel.context)
        self._max_jobs = self.max_running + max_waiting
        self._surplus = surplus_ids(panel.model.network, panel.tokenizer)
        self._inbox: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._is_open = True
        self._lock = threading.Lock()
        self._num_jobs = 0
        self._jobs: dict[int, Job] = {}  # by the generator's number
        self._has_ended = threading.Event()

    def __enter__(self) -> "Engine":
        threading.Thread(target=self._run, name="engine", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._inbox.put(("close", None))
        self._has_ended.wait()

    @property
    def num_jobs(self) -> int:
        """How many are answered or wait."""
        return self._num_jobs

    @property
    def num_running(self) -> int:
        """How many are answered at the moment."""
        return min(self._num_jobs, self.max_running)

    def submit(self, jobs: list[Job]) -> None:
        """Take jobs, all or none.

        Raises:
            BusyError: too many wait.
        """
        with self._lock:
            if self._num_jobs + len(jobs) > self._max_jobs:
                raise BusyError
            self._num_jobs += len(jobs)
        for job in jobs:
            self._inbox.put(("submit", job))

    def cancel(self, job: Job) -> None:
        """Give a job's place free before its next token. Nothing happens if it has ended."""
        self._inbox.put(("cancel", job))

    def _run(self) -> None:
        try:
            self._answer_all()
        finally:
            self._has_ended.set()
        # What MLX has compiled for this thread is freed at the thread's end. If the interpreter
        # ends at the same time, that aborts the process: so the thread stays until then.
        threading.Event().wait()

    def _answer_all(self) -> None:
        generator = self._new_generator()
        while self._is_open or self._num_jobs:
            self._take(generator)
            if not self._jobs:
                continue
            try:
                with mx.stream(generator.stream):
                    _, responses = generator.next()
                for response in responses:
                    self._handle(generator, response)
            except Exception:  # such as no memory left: these fail, the next ones may not
                _log.exception("the engine failed; %d answers were lost", len(self._jobs))
                for number in list(self._jobs):
                    self._end(number, "error")
                generator.close()
                generator = self._new_generator()
            self._expire(generator)
        generator.close()

    def _new_generator(self) -> BatchGenerator:
        return BatchGenerator(
            self.panel.model,
            stop_tokens=[[token] for token in self.panel.tokenizer.eos_token_ids],
            completion_batch_size=self.max_running,
            prefill_batch_size=min(8, self.max_running),
        )

    def _take(self, generator: BatchGenerator) -> None:
        """Handle what has come in; wait for it if nothing runs."""
        while True:
            try:
                what, job = self._inbox.get(block=self._is_open and not self._jobs)
            except queue.Empty:
                return
            if what == "close":
                self._is_open = False
            elif what == "submit" and job:
                self._start(generator, job)
            elif what == "cancel":
                for number in [number for number, each in self._jobs.items() if each is job]:
                    generator.remove([number])
                    self._forget(number)

    def _start(self, generator: BatchGenerator, job: Job) -> None:
        job.detokenizer = self.panel.tokenizer.detokenizer
        try:
            (number,) = generator.insert(
                [job.prompt],
                max_tokens=[job.sampling.max_tokens],
                caches=[self.panel.model.make_cache(job.voice.number)],
                samplers=[make_sampler(job.sampling)],
                logits_processors=[make_processors(job.sampling, self._surplus)],
            )
        except Exception:
            _log.exception("an answer could not be begun")
            self._release()
            job.deliver(Ended("error", 0))
            return
        self._jobs[number] = job

    def _handle(self, generator: BatchGenerator, response: Any) -> None:
        job = self._jobs[response.uid]
        is_end_token = response.finish_reason == "stop"
        job.num_tokens += 1
        if not is_end_token:
            job.detokenizer.add_token(response.token)
        if response.finish_reason:
            job.detokenizer.finalize()
        text = job.stops.add(job.detokenizer.last_segment)
        reason = "stop" if job.stops.is_found else response.finish_reason
        if response.finish_reason and not job.stops.is_found:
            text += job.stops.rest()
        if not job.has_begun:
            text = text.lstrip()
            job.has_begun = bool(text)
        chances = None if is_end_token else self._chances(job, response)
        if text or chances:
            job.deliver(Piece(text, chances))
        if reason:
            if not response.finish_reason:
                generator.remove([response.uid])
            self._end(response.uid, reason)

    def _chances(self, job: Job, response: Any) -> TokenChances | None:
        if job.num_likely is None:
            return None
        logprobs = np.array(response.logprobs.astype(mx.float32))
        decode = self.panel.tokenizer.decode
        likely = np.argsort(-logprobs, kind="stable")[: job.num_likely]
        others = tuple((decode([int(token)]), _finite(logprobs[token])) for token in likely)
        return TokenChances(decode([response.token]), _finite(logprobs[response.token]), others)

    def _expire(self, generator: BatchGenerator) -> None:
        now = time.monotonic()
        for number in [number for number, job in self._jobs.items() if job.deadline < now]:
            generator.remove([number])
            self._end(number, "timeout")

    def _end(self, number: int, reason: str) -> None:
        job = self._jobs[number]
        self._forget(number)
        job.deliver(Ended(reason, job.num_tokens))

    def _forget(self, number: int) -> None:
        del self._jobs[number]
        self._release()

    def _release(self) -> None:
        with self._lock:
            self._num_jobs -= 1


def _finite(logprob: float) -> float:
    """For JSON, which has no infinity: what OpenAI gives for a token that cannot be drawn."""
    return max(float(logprob), -9999.0)
