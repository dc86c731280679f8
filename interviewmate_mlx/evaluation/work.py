"""What each model of a comparison is put through, shared out between ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from interviewmate_mlx.base.tokenizer import TokenizerWrapper
from interviewmate_mlx.coach.generate import Answer, answer_all
from interviewmate_mlx.coach.sampling import Sampling
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.evaluation.harness import Metrics, run_tasks
from interviewmate_mlx.evaluation.loss import RowLoss, row_losses
from interviewmate_mlx.files import Progress
from interviewmate_mlx.model.zoo import Network
from interviewmate_mlx.training.ranks import Ranks

# Called with what is done, how much of it, and how much there is.
TaskProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Work:
    """The work on one model after the other. All ranks know what each has found.

    Attributes:
        ranks: that share it.
        model: in eval mode; as it is when a method is called.
        tokenizer: the base's.
        progress: of this rank's share.
    """

    ranks: Ranks
    model: Network
    tokenizer: TokenizerWrapper
    progress: TaskProgress

    def losses(self, title: str, examples: Sequence[Example]) -> list[RowLoss]:
        """Each row's loss; rows are dealt one by one."""
        progress = self._part(f"loss of {title}")
        found = self.ranks.deal(
            len(examples),
            lambda mine: row_losses(self.model, [examples[n] for n in mine], progress),
        )
        return [RowLoss(*row) for row in found]

    def answers(
        self, title: str, prompts: Sequence[list[int]], sampling: Sampling | None
    ) -> list[Answer]:
        """An answer to each prompt; prompts are dealt one by one. None without `sampling`."""
        if not sampling:
            return []
        progress = self._part(f"answers of {title}")

        def compute(mine: Sequence[int]) -> list[tuple[str, bool]]:
            own = [prompts[n] for n in mine]
            said = answer_all(self.model, self.tokenizer, own, sampling, progress, mine)
            return [(answer.text.strip(), answer.has_ended) for answer in said]

        return [Answer(*found) for found in self.ranks.deal(len(prompts), compute)]

    def tasks(
        self, title: str, tasks: Sequence[str], folder: Path | None, limit: int
    ) -> dict[str, Metrics]:
        """The numbers of lm-eval's tasks. Whole tasks are dealt: a rank may get none."""
        mine = np.array_split(tasks, self.ranks.size)[self.ranks.rank].tolist()
        found: dict[str, Metrics] = {}
        with self.ranks.together():
            if mine:
                progress = self._part(f"tasks of {title}")
                found = run_tasks(
                    self.model,
                    self.tokenizer,
                    mine,
                    include=folder,
                    limit=limit,
                    progress=progress,
                )
        return {
            task: of_task for part in self.ranks.gather(found) for task, of_task in part.items()
        }

    def _part(self, title: str) -> Progress:
        return lambda done, total: self.progress(title, done, total)
