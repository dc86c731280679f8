"""Answers from a base and an adapter."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.generate import stream_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from interviewmate_mlx import backend
from interviewmate_mlx.adapter.folder import Adapter, template_for
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.data.prompts import Template, encode_prompt
from interviewmate_mlx.errors import ConfigError, HubError, ModelError, WeightsError
from interviewmate_mlx.files import Progress
from interviewmate_mlx.model.falcon import Model


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def load_coach(
    base: str | Path | None = None,
    adapter: Path | str | None = None,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> tuple[Model, TokenizerWrapper]:
    """Load a base and, if given, an adapter onto it.

    Args:
        base: `mini`, a folder or a Hub id; by default the one that the adapter names.
        adapter: a PEFT folder.
        dtype: of the weights.
        progress: called with bytes done and bytes in all, while a base is pulled and
            converted.

    Raises:
        InterviewMateError: one of them is missing or does not fit.

    Warns:
        UserWarning: the adapter fits, but was trained on other weights. This is not an error:
            only the user can know whether the base was trained further.
    """
    opened = Adapter.open(adapter) if adapter else None
    name = base or (opened.config.base if opened else "")
    if not name:
        raise ConfigError(
            "No base: name one (mini, a folder, or a Hub id such as tiiuae/falcon-rw-1b), "
            "or an adapter that names its base.",
            "base",
            "adapter",
        )
    try:
        opened_base = Base.open(name, progress)
    except (ConfigError, HubError, ModelError) as error:
        if base or isinstance(error, WeightsError):
            raise
        # The adapter may come from another machine, or the folder was moved.
        raise type(error)(
            f"{adapter} names its base {name}, which cannot be opened here:\n{error}\n"
            "If the base is elsewhere here, or on the Hub, give its name.",
            "base",
        ) from error
    model = opened_base.load(backend.resolve_dtype(dtype))
    if opened:
        opened.apply(model)
        expected, got = opened.base_hash, opened_base.weights_hash
        if expected and got and expected != got:
            warnings.warn(
                f"{adapter} was trained on other weights than those in {opened_base.folder}; "
                "its answers may make no sense.",
                stacklevel=2,
            )
    model.eval()
    return model, opened_base.tokenizer


def stream_answer(
    model: Model,
    tokenizer: TokenizerWrapper,
    question: str,
    sampling: Sampling = Sampling(),
) -> Iterator[str]:
    """Yield the answer to a question piece by piece, until the end token or `max_tokens`.

    The question is put as the adapter's training rows were: with the template of questions,
    or, if those were verbatim texts, as it stands. Then the answer is what follows it.
    """
    if sampling.temperature > 0:
        mx.random.seed(sampling.seed)
    prompt = encode_prompt(tokenizer, question, template_for(model))
    sampler = make_sampler(temp=sampling.temperature, top_p=sampling.top_p)
    for piece in stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=sampling.max_tokens,
        sampler=sampler,
        logits_processors=[partial(_hide_surplus, _surplus(model, tokenizer))],
    ):
        yield piece.text


def _surplus(model: Model, tokenizer: TokenizerWrapper) -> mx.array | None:
    """Which of the model's ids the tokenizer has no token for, (V,) bool; None if there are none.

    Embeddings are often rounded up, and nothing has taught a model not to choose those rows.
    """
    surplus = np.ones(model.args.vocab_size, bool)
    surplus[list(tokenizer.get_vocab().values())] = False
    return mx.array(surplus) if surplus.any() else None


def _hide_surplus(surplus: mx.array | None, _: mx.array, logits: mx.array) -> mx.array:
    return logits if surplus is None else mx.where(surplus, -mx.inf, logits)


def answer(
    model: Model,
    tokenizer: TokenizerWrapper,
    question: str,
    sampling: Sampling = Sampling(),
) -> str:
    """The whole answer to a question, without the space that the template puts before it."""
    text = "".join(stream_answer(model, tokenizer, question, sampling))
    return text if template_for(model) == Template.VERBATIM else text.strip()
