"""A model as lm-eval wants it, and lm-eval's tasks run on it.

lm-eval asks three things: how likely a text is after another, how likely a text is, and what
follows one until some text comes. The class is lm-eval's; the numbers come from `row_losses`
and `answer_all`, in batches.
"""

import contextlib
import io
import itertools
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from interviewmate_mlx.base.tokenizer import TokenizerWrapper
from interviewmate_mlx.coach.generate import answer_all
from interviewmate_mlx.coach.sampling import Sampling
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.data.records import Record
from interviewmate_mlx.errors import ConfigError
from interviewmate_mlx.evaluation.loss import row_losses
from interviewmate_mlx.files import Progress
from interviewmate_mlx.model.zoo import Network

# Of a task: metric -> number, as lm-eval names them.
Metrics = dict[str, float]

MAX_LENGTH = 2048  # tokens: what Falcon-RW was trained with
_MAX_GENERATED = 256  # lm-eval's own default
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


def check_installed() -> None:
    """Refuse to begin without lm-eval.

    Raises:
        ConfigError: it is missing.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "Tasks are run by lm-eval, which is not installed.\n"
            'Install it: pip install "interviewmate-mlx[harness]".'
        )


def run_tasks(
    model: Network,
    tokenizer: TokenizerWrapper,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int = 0,
    progress: Progress = lambda *_: None,
) -> dict[str, Metrics]:
    """Run tasks of lm-eval.

    Args:
        model: in eval mode.
        tokenizer: the base's.
        tasks: their names.
        include: a folder with tasks of one's own, as lm-eval has them.
        limit: of a task's documents, the first ones; 0: all.
        progress: called with requests done and requests asked for so far.

    Returns:
        The numbers of each task; a group of tasks has them for each of its own.

    Raises:
        ConfigError: a task is not known, cannot be loaded, or asks for what cannot be done.
    """
    # Here, because it takes seconds to load, and it is an extra.
    from lm_eval import simple_evaluate  # noqa: PLC0415

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(tasks, include)
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise ConfigError(
            f"lm-eval has no task {', '.join(unknown)}.\nIts list: lm-eval ls tasks. For tasks of "
            "your own, name their folder."
        )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its bars; ours is shown
            found = simple_evaluate(
                model=as_lm(model, tokenizer, progress),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit or None,
                bootstrap_iters=0,
                log_samples=False,
            )
    except (OSError, ValueError, KeyError) as error:  # of reading a task's data
        raise ConfigError(
            f"lm-eval could not run {', '.join(tasks)}: {type(error).__name__}: {error}\n"
            "Most tasks download their data from the Hub."
        ) from error
    return {
        task: {
            name.removesuffix(",none"): value
            for name, value in metrics.items()
            if isinstance(value, int | float) and "stderr" not in name
        }
        for task, metrics in found["results"].items()
    }


def _manager(tasks: Sequence[str], include: Path | None) -> Any:
    """What finds the tasks. lm-eval's own are thousands of files, read only if they are needed."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    if not include:
        return TaskManager()
    alone = TaskManager(include_path=str(include), include_defaults=False)
    # A group may be one of lm-eval's own tasks.
    if set(tasks) <= set(alone.all_subtasks):
        return alone
    return TaskManager(include_path=str(include))


def as_lm(model: Network, tokenizer: TokenizerWrapper, progress: Progress = lambda *_: None) -> Any:
    """A model as an `lm_eval.api.model.LM`.

    Args:
        model: in eval mode.
        tokenizer: the base's.
        progress: called with requests done and requests asked for so far.
    """
    from lm_eval.api.model import TemplateLM  # noqa: PLC0415
    from lm_eval.models.utils import (  # noqa: PLC0415
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: PLC0415

    done = asked = 0

    def reported(count: int) -> Progress:
        """Progress over requests of several calls."""
        nonlocal asked
        before, asked = done, asked + count

        def report(now: int, _: int) -> None:
            nonlocal done
            done = before + now
            progress(done, asked)

        return report

    class HarnessModel(TemplateLM):
        """Answers lm-eval's requests."""

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def tokenizer_name(self) -> str:
            return type(tokenizer).__name__

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return list(tokenizer.encode(string, add_special_tokens=False))

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            examples = []
            for _texts, context, continuation in requests:
                # As lm-eval's own model: the last tokens, one more than can go in.
                tokens = (context + continuation)[-(MAX_LENGTH + 1) :]
                start = len(tokens) - len(continuation)
                counts = np.arange(len(tokens)) >= max(1, start)
                examples.append(Example(Record(""), np.array(tokens, np.int32), counts))
            losses = row_losses(model, examples, reported(len(examples)))
            return [(-loss.nats, loss.correct == loss.tokens) for loss in losses]

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
            windows = [
                [
                    (None, *make_disjoint_window(window))
                    for window in get_rolling_token_windows(
                        token_list=self.tok_encode(request.args[0]),
                        prefix_token=self.prefix_token_id,
                        max_seq_len=MAX_LENGTH,
                        context_len=1,
                    )
                ]
                for request in requests
            ]
            flat = [window for of_request in windows for window in of_request]
            found = iter(self._loglikelihood_tokens(flat))
            return [
                sum(logprob for logprob, _ in itertools.islice(found, len(of_request)))
                for of_request in windows
            ]

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            texts: dict[int, str] = {}
            by_settings: dict[str, list[int]] = {}
            for number, request in enumerate(requests):
                by_settings.setdefault(repr(request.args[1]), []).append(number)
            end = tokenizer.decode([self.eot_token_id])
            for numbers in by_settings.values():
                settings = normalize_gen_kwargs(requests[numbers[0]].args[1], _MAX_GENERATED)
                if unknown := settings.keys() - _KNOWN:
                    raise ValueError(f"settings of generation: {', '.join(sorted(unknown))}")
                stops = handle_stop_sequences(settings.get("until"), eos=end)
                most = settings["max_gen_toks"]
                prompts = [
                    self.tok_encode(requests[number].args[0])[-(MAX_LENGTH - most) :]
                    for number in numbers
                ]
                sampling = Sampling(
                    most, settings["temperature"], settings.get("top_p", 1.0), stop=tuple(stops)
                )
                answers = answer_all(model, tokenizer, prompts, sampling, reported(len(prompts)))
                for number, answer in zip(numbers, answers, strict=True):
                    texts[number] = postprocess_generated_text(answer.text, stops, None)
            return [texts[number] for number in range(len(requests))]

    return HarnessModel()
