"""What `/metrics` says, in Prometheus' form."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Numbers of a server since its start; none of them tells what was said."""

    def __init__(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """
        Args:
            waiting: how many answers wait at the moment.
            running: how many are computed at the moment.
        """
        self._registry = CollectorRegistry()
        known: dict[str, Any] = {"registry": self._registry, "namespace": "imate"}
        by = ["adapter"]
        self.requests = Counter("requests", "Requests", ["adapter", "code"], **known)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", by, **known)
        self.answer_tokens = Counter("answer_tokens", "Tokens of answers", by, **known)
        self.first_token = Histogram(
            "first_token_seconds",
            "From a request to its first token",
            by,
            buckets=_SECONDS,
            **known,
        )
        self.token = Histogram(
            "token_seconds",
            "From a token to the next, mean of an answer",
            by,
            buckets=_SECONDS,
            **known,
        )
        self.ratings = Counter("ratings", "Thumbs", ["adapter", "thumbs"], **known)
        Gauge("waiting", "Answers that wait", **known).set_function(waiting)
        Gauge("running", "Answers that are computed", **known).set_function(running)

    def text(self) -> bytes:
        """All of them, in the text format."""
        return generate_latest(self._registry)
