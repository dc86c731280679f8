"""How the next token is chosen, and where a text ends."""

from interviewmate_mlx import backend as backend  # its BLAS must be loaded before MLX

# isort: split
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    greedy_sampler,
    make_logits_processors,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper

Sampler = Callable[[mx.array], mx.array]  # (B, V) log probabilities -> (B,) ids
Processor = Callable[[mx.array, mx.array], mx.array]  # ids so far, (1, V) logits -> (1, V) logits

_PENALISED_TOKENS = 64  # of the last ones


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest.

    Attributes:
        max_tokens: of an answer.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: sample from the likeliest tokens that make up this share; 1 for all.
        seed: of the draws. They do not depend on what else is generated at the time.
        top_k: sample from so many of the likeliest tokens; 0 for all.
        min_p: leave out tokens less likely than this share of the likeliest one's; 0 for none.
        repetition_penalty: divides the logits of the last 64 tokens
            (https://arxiv.org/abs/1909.05858); 1 for none.
        presence_penalty: subtracted from the logits of those tokens.
        frequency_penalty: subtracted once for each time.
        stop: an answer ends before the first of these texts.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()


def make_sampler(sampling: Sampling) -> Sampler:
    """The function that draws tokens. It has a random key of its own."""
    if sampling.temperature == 0:
        likeliest: Sampler = greedy_sampler
        return likeliest
    key = mx.random.key(sampling.seed)

    def draw(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, own = mx.random.split(key)
        if sampling.top_p < 1:
            logprobs = apply_top_p(logprobs, sampling.top_p)
        if sampling.min_p > 0:
            logprobs = apply_min_p(logprobs, sampling.min_p)
        if 0 < sampling.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, sampling.top_k)
        return mx.random.categorical(logprobs * (1 / sampling.temperature), key=own)

    return draw


def make_processors(sampling: Sampling, surplus: mx.array | None) -> list[Processor]:
    """What changes the logits before a token is drawn.

    Args:
        sampling: its penalties.
        surplus: from `surplus_ids`; these are never drawn.
    """
    has_penalty = sampling.repetition_penalty != 1
    processors: list[Processor] = make_logits_processors(
        repetition_penalty=sampling.repetition_penalty if has_penalty else None,
        repetition_context_size=_PENALISED_TOKENS,
        presence_penalty=sampling.presence_penalty,
        presence_context_size=_PENALISED_TOKENS,
        frequency_penalty=sampling.frequency_penalty,
        frequency_context_size=_PENALISED_TOKENS,
    )
    return processors if surplus is None else [*processors, partial(_hide, surplus)]


def surplus_ids(model: Any, tokenizer: TokenizerWrapper) -> mx.array | None:
    """Which of the model's ids the tokenizer has no token for, (V,) bool; None if there are none.

    Embeddings are often rounded up, and nothing has taught a model not to choose those rows.
    """
    surplus = np.ones(model.args.vocab_size, bool)
    surplus[list(tokenizer.get_vocab().values())] = False
    return mx.array(surplus) if surplus.any() else None


def _hide(surplus: mx.array, _: mx.array, logits: mx.array) -> mx.array:
    return mx.where(surplus, -mx.inf, logits)


class StopTexts:
    """Finds where a text ends that comes in pieces; holds back what may be the start of an end.

    Attributes:
        is_found: whether one of the stop texts has come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_found = False

    def add(self, piece: str) -> str:
        """Take the next piece; return what is certain now to be before the end."""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.is_found, self._held = True, ""
            return text[: min(places)]
        starts = [s[:size] for s in self._stops for size in range(1, len(s))]
        size = max((len(start) for start in starts if text.endswith(start)), default=0)
        self._held = text[len(text) - size :]
        return text[: len(text) - size]

    def rest(self) -> str:
        """What was held back, after the last piece."""
        held, self._held = self._held, ""
        return held
