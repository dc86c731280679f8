"""What happens in a run, as `loop.train` yields it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Started:
    """Everything is loaded and checked; training begins, or goes on, after `step`."""

    step: int
    total_steps: int
    steps_per_epoch: int
    num_train_rows: int
    num_valid_rows: int
    num_cut_rows: int  # whose answer was longer than max_length allows
    num_dropped_rows: int  # with nothing left to learn from
    num_trainable: int
    num_parameters: int
    peak_bytes: int  # of memory that it will take, estimated
    notes: tuple[str, ...] = ()  # what to know of a run that goes on


@dataclass(frozen=True)
class Stepped:
    """One optimizer update."""

    step: int  # from 1
    epoch: int  # from 1
    loss: float  # mean over the step's predicted tokens, nats
    learning_rate: float
    grad_norm: float  # before clipping
    num_rows: int
    num_tokens: int  # real ones, without padding
    num_predicted: int
    elapsed_s: float
    peak_bytes: int  # of memory, so far in this process


@dataclass(frozen=True)
class Validated:
    """The loss over the whole validation set after `step` updates (0: the base alone)."""

    step: int
    loss: float  # mean over its predicted tokens, nats
    is_best: bool
    elapsed_s: float


@dataclass(frozen=True)
class Saving:
    """The state after `step` updates is about to be saved; what tells of them comes first."""

    step: int


@dataclass(frozen=True)
class Finished:
    """The adapter folder is complete, or (`interrupted`) can be resumed."""

    step: int
    best_step: int | None  # whose adapter was kept; None: the last one's
    interrupted: bool
    stopped_early: bool


Event = Started | Stepped | Validated | Saving | Finished
