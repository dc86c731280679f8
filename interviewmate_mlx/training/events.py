"""What happens in a run, as `loop.train` yields it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Started:
    """Everything is loaded and checked; training begins, or goes on, after `step`."""

    step: int
    total_steps: int
    steps_per_epoch: int
    num_train_rows: int
    num_valid_rows: int
    num_truncated_rows: int  # longer than max_length allows
    num_dropped_rows: int  # with nothing left to learn from
    num_trainable: int
    num_parameters: int
    peak_bytes: int  # of memory that it will take, estimated
    disk_bytes: int  # that its checkpoints will take
    notes: tuple[str, ...] = ()  # what else to know: options without effect, what has changed


@dataclass(frozen=True)
class Stepped:
    """One optimizer update."""

    step: int  # from 1
    epoch: int  # from 1
    loss: float  # mean over the step's predicted tokens, nats; of preferences, over rows
    learning_rate: float
    grad_norm: float  # before clipping
    num_rows: int
    num_tokens: int  # real ones, without padding
    num_predicted: int
    elapsed_s: float
    peak_bytes: int  # of memory, so far in this process
    measures: dict[str, float] = field(default_factory=dict)  # what else a method measures


@dataclass(frozen=True)
class Validated:
    """The loss over the whole validation set after `step` updates (0: the base alone)."""

    step: int
    loss: float  # mean over its predicted tokens, nats
    is_best: bool
    elapsed_s: float
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What a run came to. Losses are nats per predicted token, weighted by tokens; of
    preferences, they are what the method's formula gives, weighted by rows.
    """

    run: str
    base: str
    steps: int
    epochs: float
    first_loss: float  # training loss over the first steps
    final_loss: float  # over the last
    loss_window_steps: int
    base_valid_loss: float | None  # before the first step
    best_valid_loss: float | None
    best_step: int | None  # whose adapter was kept; None: the last one's
    stopped_early: bool
    train_rows: int
    valid_rows: int
    trainable_parameters: int
    total_parameters: int
    training_s: float  # steps alone, without loading and validation
    samples_per_s: float
    tokens_per_s: float  # real tokens, without padding
    peak_gb: float
    package_version: str
    machine: str = ""  # its device, the dtype of the weights, and MLX's version
    method: str = "sft"
    started_from: str = ""  # an adapter's folder; "": the base alone
    base_valid_measures: dict[str, float] = field(default_factory=dict)  # before the first step
    best_valid_measures: dict[str, float] = field(default_factory=dict)  # of the kept adapter

    @property
    def reduction(self) -> float:
        """Share of the first training loss that is gone."""
        return 1 - self.final_loss / self.first_loss

    @property
    def trainable_share(self) -> float:
        return self.trainable_parameters / self.total_parameters


@dataclass(frozen=True)
class Finished:
    """The adapter folder is complete, or (`interrupted`) can be resumed."""

    step: int
    best_step: int | None  # whose adapter was kept; None: the last one's
    interrupted: bool
    stopped_early: bool
    summary: Summary  # of what was done so far


Event = Started | Stepped | Validated | Finished
