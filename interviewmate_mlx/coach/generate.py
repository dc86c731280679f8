"""Answers from a base and an adapter."""

from interviewmate_mlx import backend  # its BLAS must be loaded before MLX

# isort: split
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_lm.generate import BatchGenerator, stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from interviewmate_mlx.adapter.folder import Adapter, template_for
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.coach.sampling import (
    Sampling,
    StopTexts,
    make_processors,
    make_sampler,
    surplus_ids,
)
from interviewmate_mlx.data.prompts import encode_messages, encode_prompt
from interviewmate_mlx.data.records import Message
from interviewmate_mlx.data.templates import VERBATIM, end_ids
from interviewmate_mlx.errors import ConfigError, HubError, ModelError, WeightsError
from interviewmate_mlx.files import Progress
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.model.zoo import Network

_MOST_AT_ONCE = 32  # answers; more at once gain nothing


def load_coach(
    base: str | Path | None = None,
    adapter: Path | str | None = None,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> tuple[Network, TokenizerWrapper]:
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
        UserWarning: the adapter fits, but was trained on other weights.
    """
    opened = Adapter.open(adapter) if adapter else None
    opened_base = open_base(base, opened, progress)
    model = opened_base.load(backend.resolve_dtype(dtype))
    if opened:
        opened.apply(model)
        warn_of_other_weights(opened, opened_base)
    model.eval()
    tokenizer = opened_base.tokenizer
    tokenizer.eos_token_ids = end_ids(opened.template if opened else None, tokenizer)
    return model, tokenizer


def open_base(
    base: str | Path | None, adapter: Adapter | None, progress: Progress | None = None
) -> Base:
    """Open a base by its name, or the one that an adapter names.

    Raises:
        InterviewMateError: there is no name, or it cannot be opened.
    """
    name = base or (adapter.config.base if adapter else "")
    if not name:
        raise ConfigError(
            "No base: name one (mini, a folder, or a Hub id such as tiiuae/falcon-rw-1b), "
            "or an adapter that names its base.",
            "base",
            "adapter",
        )
    try:
        opened = Base.open(name, progress)
    except (ConfigError, HubError, ModelError) as error:
        if base or adapter is None or isinstance(error, WeightsError):
            raise
        # The adapter may come from another machine, or the folder was moved.
        raise type(error)(
            f"{adapter.folder} names its base {name}, which cannot be opened here:\n{error}\n"
            "If the base is elsewhere here, or on the Hub, give its name.",
            "base",
        ) from error
    for doubt in opened.network.doubts:
        warnings.warn(f"{name}: {doubt}; its answers may be wrong.", stacklevel=2)
    return opened


def warn_of_other_weights(adapter: Adapter, base: Base) -> None:
    """Warn if an adapter was trained on other weights than those of a base.

    This is not an error: only the user can know whether the base was trained further.
    """
    expected, got = adapter.base_hash, base.weights_hash
    # Whether quantised weights are those of a base that is not, cannot be told from hashes.
    are_comparable = expected and expected.rpartition(":")[0] == got.rpartition(":")[0]
    if are_comparable and expected != got:
        warnings.warn(
            f"{adapter.folder} was trained on other weights than those in {base.folder}; "
            "its answers may make no sense.",
            stacklevel=3,
        )


def prompt_for(
    model: Network, tokenizer: TokenizerWrapper, question: str, system: str = "", raw: bool = False
) -> list[int]:
    """Token ids of a question as the model is asked it.

    Args:
        model: perhaps with an adapter, which says how it was asked in training.
        tokenizer: the base's.
        question: the question.
        system: what is put before it; "" for nothing.
        raw: take the question as it stands, without a template.

    Raises:
        ConfigError: a system text, where there is no template to put it into.
        ConfigError, ModelError, DataError: the template cannot be used, or not for this.
    """
    template = VERBATIM if raw else template_for(model, tokenizer)
    if system and template == VERBATIM:
        why = "the prompt is taken as it stands" if raw else "the adapter knows verbatim texts only"
        raise ConfigError(f"A system text has no place: {why}.\nPut it into the prompt.", "system")
    if system:
        messages = [Message("system", system), Message("user", question)]
        return encode_messages(tokenizer, messages, template)
    return encode_prompt(tokenizer, question, template)


def stream_answer(
    model: Network,
    tokenizer: TokenizerWrapper,
    question: str,
    sampling: Sampling = Sampling(),
    prompt: Sequence[int] = (),
) -> Iterator[str]:
    """Yield the answer to a question piece by piece, until it ends or has `max_tokens`.

    The question is put as the adapter's training rows were: with the template of questions,
    or, if those were verbatim texts, as it stands. Then the answer is what follows it.

    Args:
        model: in eval mode.
        tokenizer: the base's.
        question: the question.
        sampling: how tokens are chosen.
        prompt: token ids to go on from in place of the question's.
    """
    stops = StopTexts(sampling.stop)
    for piece in stream_generate(
        model,
        tokenizer,
        list(prompt) or prompt_for(model, tokenizer, question),
        max_tokens=sampling.max_tokens,
        sampler=make_sampler(sampling),
        logits_processors=make_processors(sampling, surplus_ids(model, tokenizer)),
    ):
        if text := stops.add(piece.text):
            yield text
        if stops.is_found:
            return
    if text := stops.rest():
        yield text


@dataclass(frozen=True)
class Answer:
    """An answer, and whether the model ended it itself, before `max_tokens`."""

    text: str
    has_ended: bool


def answer_all(
    model: Network,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[list[int]],
    sampling: Sampling = Sampling(),
    progress: Progress = lambda *_: None,
    numbers: Sequence[int] = (),
) -> list[Answer]:
    """Answers to several prompts, computed side by side, in the order of the prompts.

    A text is as the model gives it, with the space that a template puts before an answer.

    Args:
        model: in eval mode.
        tokenizer: the base's.
        prompts: token ids, as `data.prompts.encode_messages` gives them.
        sampling: for all of them; its seed and a prompt's number make the prompt's seed.
        progress: called with answers done and answers in all.
        numbers: of the prompts, if they are some of several; by default they count from 0.
    """
    longest = max(map(len, prompts), default=0) + sampling.max_tokens
    surplus = surplus_ids(model, tokenizer)
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=num_at_once(model, longest),
    )
    own = [
        replace(sampling, seed=sampling.seed + number) for number in numbers or range(len(prompts))
    ]
    uids = generator.insert(
        [list(prompt) for prompt in prompts],
        max_tokens=[sampling.max_tokens] * len(prompts),
        samplers=[make_sampler(each) for each in own],
        logits_processors=[make_processors(sampling, surplus) for _ in prompts],
    )
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    has_ended: dict[int, bool] = {}
    # More tokens than any of the stop texts has: each has a byte at least.
    tail = max((len(text.encode()) for text in sampling.stop), default=0) + 1
    while responses := generator.next_generated():
        for response in responses:
            mine, is_end = tokens[response.uid], response.finish_reason == "stop"
            if not is_end:
                mine.append(response.token)
            last = tokenizer.decode(mine[-tail:]) if sampling.stop else ""
            is_stopped = any(stop in last for stop in sampling.stop)
            if is_stopped and not response.finish_reason:
                generator.remove([response.uid])
            if is_stopped or response.finish_reason:
                has_ended[response.uid] = bool(is_end or is_stopped)
                progress(len(has_ended), len(prompts))
    generator.close()
    return [
        Answer(_before_stop(tokenizer.decode(tokens[uid]), sampling.stop), has_ended[uid])
        for uid in uids
    ]


def _before_stop(text: str, stops: Sequence[str]) -> str:
    found = StopTexts(stops)
    return found.add(text) + found.rest()


def num_at_once(model: Network, num_tokens: int) -> int:
    """How many texts of so many tokens have room for their keys and values in the memory."""
    shape = model.args
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    of_text = 2 * len(model.layers) * heads * head_dim * model.dtype.size * num_tokens
    weights = sum(array.nbytes for array in named_arrays(model.parameters()).values())
    # Joining two batches copies their keys and values.
    room = (backend.machine().memory_bytes - weights) // (2 * of_text)
    return min(max(1, room), _MOST_AT_ONCE)


def answer(
    model: Network,
    tokenizer: TokenizerWrapper,
    question: str,
    sampling: Sampling = Sampling(),
) -> str:
    """The whole answer to a question, without the space that the template puts before it."""
    text = "".join(stream_answer(model, tokenizer, question, sampling))
    return text if template_for(model, tokenizer) == VERBATIM else text.strip()
