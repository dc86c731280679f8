"""A conversation of several turns. What was read once is kept, for each voice."""

from interviewmate_mlx import backend as backend  # its BLAS must be loaded before MLX

# isort: split
import json
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import trim_prompt_cache

from interviewmate_mlx.coach.panel import Panel, Voice
from interviewmate_mlx.coach.sampling import (
    Sampling,
    StopTexts,
    make_processors,
    make_sampler,
    surplus_ids,
)
from interviewmate_mlx.data.records import Message
from interviewmate_mlx.errors import ConfigError


@dataclass
class _Memory:
    """What a voice has read: token ids, and their keys and values."""

    cache: list[Any]
    tokens: list[int] = field(default_factory=list)

    def keep_shared(self, prompt: list[int]) -> list[int]:
        """Forget all after the tokens that a prompt shares; return the prompt's other tokens."""
        pairs = zip(self.tokens, prompt, strict=False)
        shared = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
        shared = min(len(self.tokens), len(prompt)) if shared is None else shared
        shared = min(shared, len(prompt) - 1)  # one at least, to go on from
        own = self.cache[:-1]
        trim_prompt_cache(own, own[0].offset - shared)
        self.tokens = self.tokens[:shared]
        return prompt[shared:]


class Chat:
    """A conversation with a panel.

    Attributes:
        messages: user and assistant in turn; an answer that was stopped is kept as it is.
        system: text before the first message; may be empty.
        voice: who answers.
        num_forgotten: messages, the oldest, that the last prompt had no room for.
        num_read: tokens of the last prompt that had to be computed.
    """

    def __init__(self, panel: Panel, sampling: Sampling, voice: Voice, system: str = "") -> None:
        self._panel = panel
        self.sampling = sampling
        self.system = system
        self.voice = voice
        self.messages: list[Message] = []
        self.num_forgotten = 0
        self.num_read = 0
        self._num_answers = 0
        self._memories: dict[str, _Memory] = {}
        self._surplus = surplus_ids(panel.model.network, panel.tokenizer)

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to a message, piece by piece, and keep both.

        Stop iterating to stop the answer; what came of it is kept.

        Raises:
            ConfigError: the message alone is too long for the model.
        """
        pieces = self.answer(self.voice, Message("user", text))
        said = ""
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:
            pieces.close()
            if said.strip():
                both = Message("user", text), Message("assistant", said.strip())
                self.messages = [*self.messages, *both]

    def retry(self) -> Generator[str, None, None]:
        """Answer the last message again, with other draws.

        If it is stopped before there is an answer, the one before is kept.

        Raises:
            ConfigError: there is none.
        """
        before = self.messages
        asked = self.undo()
        undone = self.messages
        try:
            yield from self.ask(asked)
        finally:
            if self.messages is undone:
                self.messages = before

    def undo(self) -> str:
        """Forget the last message and its answer; return the message.

        Raises:
            ConfigError: there is none.
        """
        if not self.messages:
            raise ConfigError("Nothing was said yet.")
        *self.messages, asked, _ = self.messages
        return asked.content

    def answer(self, voice: Voice, message: Message) -> Generator[str, None, None]:
        """Yield a voice's answer to a message after all that was said; keep nothing of it.

        Raises:
            ConfigError: the message alone is too long for the model.
        """
        prompt = self._prompt(voice, message)
        memory = self._memories.setdefault(
            voice.name, _Memory(self._panel.model.make_cache(voice.number))
        )
        unread = memory.keep_shared(prompt)
        self.num_read = len(unread)
        sampling = replace(self.sampling, seed=self.sampling.seed + self._num_answers)
        self._num_answers += 1
        stops = StopTexts(sampling.stop)
        said: list[int] = []
        try:
            for piece in stream_generate(
                self._panel.model,
                self._panel.tokenizer,
                unread,
                max_tokens=sampling.max_tokens,
                sampler=make_sampler(sampling),
                logits_processors=make_processors(sampling, self._surplus),
                prompt_cache=memory.cache,
            ):
                said.append(piece.token)
                if text := stops.add(piece.text):
                    yield text
                if stops.is_found:
                    return
            if text := stops.rest():
                yield text
        finally:
            # What was read, by the cache's own count: the network is a token ahead of us.
            read = [*prompt, *said]
            memory.tokens = read[: memory.cache[0].offset]

    def to_row(self) -> str:
        """The conversation as a row to train on: a line of JSON."""
        before = [Message("system", self.system)] if self.system else []
        messages = [{"role": m.role, "content": m.content} for m in [*before, *self.messages]]
        return json.dumps({"messages": messages}, ensure_ascii=False)

    def _prompt(self, voice: Voice, message: Message) -> list[int]:
        """Token ids of the conversation, without its oldest turns where it is too long."""
        before = [Message("system", self.system)] if self.system else []
        most = self._panel.context - self.sampling.max_tokens
        for first in range(0, len(self.messages) + 1, 2):
            self.num_forgotten = first
            messages = [*before, *self.messages[first:], message]
            prompt = voice.prompt(self._panel.tokenizer, messages)
            if len(prompt) <= most:
                return prompt
        raise ConfigError(
            f"The message has {len(prompt)} tokens, expected at most {most}: the model takes "
            f"{self._panel.context}, and {self.sampling.max_tokens} of them are for the answer.\n"
            "Make it shorter, or let answers have fewer tokens."
        )
