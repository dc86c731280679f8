"""The bodies of requests, checked: OpenAI's, as far as they are supported, and our own.

A key that is not supported is refused by its name, unless its value says that it is off.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from interviewmate_mlx.coach.interview import Grade
from interviewmate_mlx.coach.sampling import Sampling
from interviewmate_mlx.data.forms import MAX_MESSAGES
from interviewmate_mlx.files import is_utf8

MAX_CHOICES = 16
_MAX_STOPS = 16
# Values of keys that are not supported, by which a client says that it does not want them.
_OFF: dict[str, Any] = {
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "tool_choice": "none",
}


def _as_utf8(value: Any) -> Any:
    if isinstance(value, str) and not is_utf8(value):
        raise ValueError("holds half of a surrogate pair, which is not text")
    return value


Text = Annotated[str, BeforeValidator(_as_utf8)]
# The limits come before the function, so that they are in the routes' description, too.
Name = Annotated[str, Field(max_length=1000), BeforeValidator(_as_utf8)]
StopText = Annotated[str, Field(min_length=1, max_length=1000), BeforeValidator(_as_utf8)]
Said = Annotated[str, Field(max_length=20_000), BeforeValidator(_as_utf8)]


class Body(BaseModel):
    """Nothing but the known keys, and nothing converted: `"5"` is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_off(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data

        def is_off(key: str, value: Any) -> bool:
            return value in (None, False, [], {}, 0) or value == _OFF.get(key, data)

        return {k: v for k, v in data.items() if k in cls.model_fields or not is_off(k, v)}


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: bool = False


class Generation(Body):
    """What both routes of OpenAI have."""

    model: Name | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=_MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "Generation":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: allowed with stream only")
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int, seed: int) -> Sampling:
        """How tokens are drawn, with OpenAI's defaults: temperature 1, nothing cut off.

        Args:
            max_tokens: of the answer.
            seed: for a request that gives none.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            seed=seed if self.seed is None else self.seed % 2**32,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            stop=tuple(stop),
        )


class TextPart(Body):
    """Part of a message; only text is supported."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One turn. `developer` is another name of `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(Generation):
    """`POST /v1/chat/completions`"""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "ChatBody":
        roles = ["system" if m.role == "developer" else m.role for m in self.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        expected = ["user", "assistant"] * len(turns)
        if turns != expected[: len(turns)] or len(turns) % 2 == 0:
            raise ValueError(
                "messages: expected perhaps a system message, then user and assistant in turn, "
                f"a user's last; got {', '.join(roles[:8])}{', ...' * (len(roles) > 8)}"
            )
        if not all(message.text.strip() for message in self.messages):
            raise ValueError("messages: a message is empty")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: allowed with logprobs only")
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens: give one of them")
        return self


class CompletionBody(Generation):
    """`POST /v1/completions`: prompts as they stand, without a template."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @model_validator(mode="after")
    def _check(self) -> "CompletionBody":
        if not all(self.prompts):
            raise ValueError("prompt: a prompt is empty")
        if len(self.prompts) * self.num_choices > MAX_CHOICES:
            raise ValueError(f"prompt, n: expected at most {MAX_CHOICES} answers in all")
        return self


class RatingBody(Body):
    """`POST /feedback`: what a user says of an answer."""

    answer: Name
    thumbs: Literal["up", "down", ""] | None = None
    better: Said | None = None


class CompareBody(Body):
    """`POST /interview/compare`: an answer to a question of the mock interview."""

    question: Name
    answer: Said


class GradeBody(CompareBody):
    """`POST /interview/grade`: the same, with the grade that the user gives it."""

    grade: Literal["again", "hard", "good", "easy"]
    follow_up: Said = ""

    def as_grade(self) -> Grade:
        return Grade(self.grade)
