"""A run with all that it works on, loaded and checked before the first step."""

import hashlib
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from interviewmate_mlx import __version__, backend
from interviewmate_mlx.adapter.config import AdapterConfig
from interviewmate_mlx.adapter.folder import Adapter
from interviewmate_mlx.adapter.start import check_start, start_from
from interviewmate_mlx.base.base import Base, is_here
from interviewmate_mlx.config import RunConfig
from interviewmate_mlx.data.batches import steps_per_epoch
from interviewmate_mlx.data.pairs import Judged, encode_preferences
from interviewmate_mlx.data.preferences import load_preferences
from interviewmate_mlx.data.prompts import encode_records, pack_texts, template_of
from interviewmate_mlx.data.records import Record, load_splits, readings
from interviewmate_mlx.data.templates import AUTO, VERBATIM, Template, choose_template
from interviewmate_mlx.errors import (
    AdapterError,
    Checks,
    DataError,
    ModelError,
    StorageError,
    TrainingError,
    list_faults,
)
from interviewmate_mlx.files import Progress, check_free_space, is_utf8, scratch_file
from interviewmate_mlx.formats.safetensors_file import save_tensors
from interviewmate_mlx.hub.names import fetch_data, local_path
from interviewmate_mlx.model.cpu_kernels import use_cpu_kernels
from interviewmate_mlx.model.dora import start_magnitudes
from interviewmate_mlx.model.falcon import scaled_dot_product_attention
from interviewmate_mlx.model.gpu_kernels import fused_width, padded_attention, use_gpu_kernels
from interviewmate_mlx.model.lora import (
    block_numbers,
    count_parameters,
    resolve_targets,
)
from interviewmate_mlx.model.recompute import use_gradient_checkpointing
from interviewmate_mlx.model.starts import start_from_weights
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.model.zoo import Network
from interviewmate_mlx.training.checkpoint import State, disk_bytes
from interviewmate_mlx.training.cpu_streams import CpuStreams
from interviewmate_mlx.training.events import Started
from interviewmate_mlx.training.folder import adapter_config
from interviewmate_mlx.training.lora import put_lora
from interviewmate_mlx.training.memory import (
    SCORES_AGAIN,
    SCORES_CAUSAL,
    SCORES_FUSED,
    SCORES_FUSED_MASKED,
    SCORES_MASKED,
    SCORES_MASKED_ON_GPU,
    MemoryPlan,
    Scores,
    cpu_bytes_per_token,
    gpu_bytes_per_token,
    plan_memory,
    widths_of,
)
from interviewmate_mlx.training.optimizer import (
    AdamW,
    Muon,
    adamw,
    learning_rate_at,
    muon_paths,
    num_single,
)
from interviewmate_mlx.training.preference import (
    PAIRED,
    WITH_REFERENCE,
    Objective,
    divergence_of,
    kept_log_probabilities,
    log_probabilities,
    objective_of,
)
from interviewmate_mlx.training.ranks import ALONE, Ranks
from interviewmate_mlx.training.step import Executor, OneStream
from interviewmate_mlx.training.whole import check_whole

REFERENCE_FILE = "reference.safetensors"


@dataclass(frozen=True)
class Rows:
    """What a run learns from and is validated on."""

    train: list[Any]  # examples, pairs of answers, or answers with a label
    valid: list[Any]
    num_dropped: int  # with nothing left to learn from
    template: Template  # how prompts are put to the model
    renamed: list[str]  # what to tell the user of their keys

    @property
    def all(self) -> list[Any]:
        return self.train + self.valid


@dataclass(frozen=True)
class Task:
    """A run with all that it works on, loaded and checked."""

    run: RunConfig
    base: Base
    model: Network
    rows: Rows
    memory: MemoryPlan
    executor: Executor
    fingerprint: dict[str, str]  # of base and data
    objective: Objective
    ranks: Ranks = ALONE  # that train it together

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the layers that have a LoRA."""
        return resolve_targets(self.model, self.run.lora.targets)

    @property
    def adapter_config(self) -> AdapterConfig:
        """What the adapter's folder says of it."""
        numbers = block_numbers(self.model, self.run.lora.layers)
        found = adapter_config(self.run, self.targets, numbers)
        return found if self.run.lora.init == "default" else found.of_twice_the_rank()

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.rows.train), self.run.train.effective_batch)

    @property
    def total_steps(self) -> int:
        return self.run.train.total_steps(self.steps_per_epoch)

    def with_references(self, out: Path | None) -> "Task":
        """The same, whose rows know what the model gives them as it stands, where that is asked.

        The model must be as the run begins. A fresh LoRA changes nothing, so that is the base; a
        run that starts from an adapter is compared with that one.

        Args:
            out: the run's folder; None where another rank has it.

        Raises:
            StorageError: they cannot be kept in the run's folder.
        """
        if self.run.train.method not in WITH_REFERENCE:
            return self
        answers = [answer for row in self.rows.all for answer in row.compared]
        found = kept_log_probabilities(
            out / REFERENCE_FILE if out else None,
            self.fingerprint,
            lambda: log_probabilities(
                self.model, answers, self.executor, self.memory.step_tokens, self.ranks
            ),
            self.ranks,
        )
        values = iter(found.reshape(-1, 2).tolist())
        train, valid = (
            [row.with_references(next(values)) for row in rows]
            for rows in (self.rows.train, self.rows.valid)
        )
        return replace(self, rows=replace(self.rows, train=train, valid=valid))

    def memory_limits(self) -> AbstractContextManager[None]:
        """Keep MLX within the plan."""
        own = sum(array.nbytes for array in named_arrays(self.model.parameters()).values())
        return backend.memory_limits(self.memory.memory_bytes, own, self.memory.peak_bytes)

    def describe(self, step: int, notes: list[str]) -> Started:
        """What is known before the first step, or before going on after `step`."""
        num_trainable, num_parameters = count_parameters(self.model)
        return Started(
            step=step,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            num_train_rows=len(self.rows.train),
            num_valid_rows=len(self.rows.valid),
            num_truncated_rows=sum(
                any(side.num_truncated for side in row.sides) for row in self.rows.all
            ),
            num_dropped_rows=self.rows.num_dropped,
            num_trainable=num_trainable,
            num_parameters=num_parameters,
            peak_bytes=self.memory.peak_bytes,
            disk_bytes=disk_bytes(self.run, self.model),
            notes=(
                *notes,
                *self.ranks.notes(),
                *self.base.network.doubts,
                *self.rows.renamed,
                *idle_options(self.run, self.rows),
            ),
        )


def prepare(
    run: RunConfig,
    out: Path | None = None,
    state: State | None = None,
    progress: Progress | None = None,
    base: Base | None = None,
    ranks: Ranks = ALONE,
) -> Task:
    """Load and check the base and the data of a run, and put the LoRA on.

    Everything is checked before the weights are read, and all faults are told at once.

    Args:
        run: what to train.
        out: where the run will write; its disk is checked.
        state: of the run that goes on, whose base, data and memory plan are kept.
        progress: called with bytes done and bytes in all, while base or data is pulled.
        base: the run's, if it is open already.
        ranks: that train it together; all prepare it.

    Raises:
        InterviewMateError: what is missing, faulty or changed.
    """
    checks = Checks(f"The run {run.name} cannot start")
    splits = checks.run(read_splits, run, progress)
    # A base is not pulled for a run whose data is at fault.
    needs = [] if base or is_here(run.model.base) else [splits]
    base = checks.run(lambda *_: base or Base.open(run.model.base, progress), *needs)
    checks.run(check_network, run, base)
    model = checks.run(build_model, run, base)
    start = checks.run(open_start, run, base, model, out)
    checks.run(check_disk, run, model, out)
    rows = checks.run(encode_rows, run, splits, base)
    checks.run(check_row_lengths, rows, base)
    checks.run(check_steps, run, rows, state)
    fingerprint = checks.run(hash_inputs, base, rows, start)
    checks.run(check_unchanged, fingerprint, state)
    memory = checks.run(plan, run, model, rows, state, ranks.size)
    checks.raise_faults()
    base.read(model)
    if run.lora.init != "default":
        start_from_weights(model, run.lora.init)
    if run.lora.dora:
        start_magnitudes(model)
    if isinstance(start, Adapter):
        start_from(start, model)
    executor = choose_executor().limited_to(memory.max_rows)
    objective = choose_objective(run, model, executor, memory.token_budget, ranks)
    return Task(run, base, model, rows, memory, executor, fingerprint, objective, ranks)


def open_start(run: RunConfig, base: Base, model: Network, out: Path | None) -> Adapter | str:
    """The adapter that a run starts from; "" if it starts afresh.

    Raises:
        AdapterError: it cannot be read, is not of the run's base and shape, or would be
            written over.
        ModelError: the base would be.
    """
    if out and out.resolve() == base.folder.resolve():
        raise ModelError(f"The run would write over its base: {out}\nChoose another folder.", "out")
    if not run.lora.start_from:
        return ""
    folder = local_path(run.lora.start_from)
    if out and out.resolve() == folder.resolve():
        raise AdapterError(
            f"The run would write over the adapter that it starts from: {folder}\n"
            "Choose another folder.",
            "out",
        )
    adapter = Adapter.open(folder)
    check_start(adapter, model, base.weights_hash, run.lora.alpha, run.lora.rslora)
    return adapter


def choose_objective(
    run: RunConfig, model: Network, executor: Executor, token_budget: int, ranks: Ranks
) -> Objective:
    """What a run makes smaller."""
    asked = run.preference
    return objective_of(
        run.train.method,
        asked.beta,
        asked.label_smoothing,
        asked.length_normalized,
        asked.target_margin,
        divergence_of(model, executor, token_budget, ranks),
    )


def read_splits(run: RunConfig, progress: Progress | None) -> dict[str, list[Any]]:
    """The checked rows of a run's data, by split: records, or preferences.

    Raises:
        DataError: rows that cannot be read, all of them.
        HubError: the Hub did not give them.
    """
    path = fetch_data(run.data.path, progress)
    if run.train.method == "sft":
        return load_splits(path)
    return load_preferences(path, is_paired=run.train.method in PAIRED)


def encode_rows(run: RunConfig, splits: dict[str, list[Any]], base: Base) -> Rows:
    """A run's rows in tokens.

    Raises:
        ConfigError, ModelError: the template cannot be used.
        DataError: it cannot be used for some rows, or no row has anything left to learn from.
    """
    data, tokenizer = run.data, base.tokenizer
    template = choose_template(data.template, tokenizer)

    def encoded(split: str) -> tuple[list[Any], int]:
        rows, settings = splits.get(split, []), (data.max_length, data.train_on, template)
        if data.pack:
            return pack_texts(tokenizer, rows, data.max_length), 0
        if run.train.method == "sft":
            kept, dropped = encode_records(tokenizer, rows, *settings)
            return kept, len(dropped)
        return encode_preferences(tokenizer, rows, *settings, run.train.effective_batch)

    (train, num_dropped), (valid, num_valid_dropped) = encoded("train"), encoded("valid")
    if not train:
        raise DataError(
            f"{data.path}: of {num_dropped} rows none has a token left to learn from after "
            f"{data.max_length} tokens.\nRaise data.max_length."
        )
    asked = template_of((row.record for row in train), template)
    renamed = renamed_keys(splits["train"] if data.pack else [row.record for row in train])
    return Rows(train, valid, num_dropped + num_valid_dropped, asked, renamed)


def build_model(run: RunConfig, base: Base) -> Network:
    """A run's base with what is trained, its weights not in memory yet.

    Raises:
        AdapterError: the LoRA does not fit the base.
        ModelError: not all of its weights can be trained.
        WeightsError: the weights do not fit the network.
    """
    dtype = backend.resolve_dtype(run.model.dtype)
    model = base.build(dtype)
    mx.random.seed(run.train.seed)
    if run.train.weights == "all":
        check_whole(base, model)
    else:
        put_lora(run, base, model)
    choose_kernels(model, dtype)
    if run.train.gradient_checkpointing:
        use_gradient_checkpointing(model)
    return model


def check_network(run: RunConfig, base: Base) -> None:
    """Refuse a network of which it is not known that it computes what its config describes.

    Raises:
        ModelError: why, all of it.
    """
    doubts = base.network.doubts
    if doubts and not run.model.untested_base:
        raise ModelError(
            f"{base.name} may not compute what its config.json describes:\n{list_faults(doubts)}\n"
            "Choose another base, or set model.untested_base to train it all the same.",
            "untested_base",
        )


def check_row_lengths(rows: Rows, base: Base) -> None:
    """Refuse rows that are longer than the network computes as transformers does.

    Raises:
        DataError: there are such rows.
    """
    limit = base.network.longest_row
    longest = max(map(len, rows.all))
    if limit and longest > limit:
        raise DataError(
            f"The longest row has {longest} tokens, and mlx-lm computes {base.network.model_type} "
            f"only up to {limit} as config.json describes it (sliding_window, or the length that "
            f"its rotary factors hold for).\nSet data.max_length to {limit}."
        )


def choose_executor() -> Executor:
    """Where this machine computes microbatches."""
    num_streams = backend.machine().cpu_streams
    return CpuStreams(num_streams) if num_streams else OneStream()


def memory_for(run: RunConfig) -> int:
    """Bytes that a run may plan with: what the machine can give, or less if the run says so."""
    given = backend.machine().memory_bytes
    return min(given, int(run.train.memory_gb * 1e9)) if run.train.memory_gb else given


def choose_optimizer(run: RunConfig, model: Network) -> AdamW:
    """A run's own; the learning rate is set before each step."""
    if run.train.optimizer == "muon":
        return Muon(run.train.weight_decay, muon_paths(model))
    return adamw(run.train.weight_decay, run.lora.plus_ratio)


def choose_kernels(model: Network, dtype: mx.Dtype) -> None:
    """Let a model train with the kernels that are fastest here, in place."""
    here = backend.machine()
    if here.path == "cpu":
        if dtype == mx.float32:
            use_cpu_kernels(model)
        return
    use_gpu_kernels(model, dtype)


def attention_of(model: Network, dtype: mx.Dtype) -> tuple[Scores, int]:
    """What becomes of attention's scores, as a model trains here; and how wide a head is then."""
    here, head_dim = backend.machine(), widths_of(model).head_dim
    found = [module.attend for module in model.modules() if hasattr(module, "attend")]
    if not found:  # the others ask MLX for causal attention, at the lengths that their rows have
        has_kernel = here.device != "cpu" and backend.has_causal_kernel(head_dim, dtype)
        return SCORES_FUSED if has_kernel else SCORES_CAUSAL, head_dim
    if found[0] is scaled_dot_product_attention:
        return SCORES_MASKED if here.path == "cpu" else SCORES_MASKED_ON_GPU, head_dim
    if here.path == "cpu":
        return SCORES_AGAIN, head_dim
    if found[0] is padded_attention:
        return SCORES_FUSED_MASKED, head_dim
    # MLX's CPU backend computes fused attention by parts.
    scores = SCORES_MASKED_ON_GPU if here.device == "cpu" else SCORES_FUSED
    return scores, fused_width(model)


def versions() -> dict[str, str]:
    """What a run's bytes depend on beside the run, its base and its data."""
    here = backend.machine()
    return {
        "interviewmate-mlx": __version__,
        "mlx": here.mlx_version,
        "device": here.device_name,
        "BLAS": Path(here.blas or "MLX's own").name,
        "CPU streams": str(here.cpu_streams),
    }


def hash_inputs(base: Base, rows: Rows, start: Adapter | str) -> dict[str, str]:
    """What tells the base, the data and the first adapter of a run from others."""
    digest = hashlib.sha256()
    for row in rows.all:
        digest.update(row.content())
    found = {"base": base.fingerprint, "data": digest.hexdigest()}
    if isinstance(start, Adapter):
        found["start"] = hashlib.sha256(start.weights_file.read_bytes()).hexdigest()
    return found


def check_unchanged(fingerprint: dict[str, str], state: State | None) -> None:
    """Refuse to go on with another base or other data than the run began with.

    Raises:
        TrainingError: what has changed, all of it.
    """
    if state is None:
        return
    changed = [name for name, value in fingerprint.items() if state.fingerprint.get(name) != value]
    if changed:
        raise TrainingError(
            f"The run cannot be resumed, for this has changed since: {', '.join(changed)}.\n"
            "Restore it, or train again into another folder.",
            "out",
        )


def check_steps(run: RunConfig, rows: Rows, state: State | None) -> None:
    """Refuse a run that cannot change anything, or that would end before where it stands.

    Raises:
        TrainingError: the learning rate of every step is 0, or more steps are done than the
            run has.
    """
    settings = run.train
    total_steps = settings.total_steps(steps_per_epoch(len(rows.train), settings.effective_batch))
    if state and state.step > total_steps:
        raise TrainingError(
            f"The run has done {state.step} steps, and would have only {total_steps} with "
            f"train.epochs {settings.epochs:g} and train.max_steps {settings.max_steps}.\n"
            "Give it no fewer than it has done."
        )
    rates = (
        learning_rate_at(
            step,
            total_steps,
            settings.learning_rate,
            settings.schedule,
            settings.warmup_ratio,
            settings.warmup_steps,
            settings.floor,
        )
        for step in range(total_steps)
    )
    if not any(rates):
        raise TrainingError(
            f"The learning rate is 0 in all steps of the run (it has {total_steps}): the warmup "
            f"starts at 0 (train.warmup_ratio: {settings.warmup_ratio:g}, train.warmup_steps: "
            f"{settings.warmup_steps}).\nTrain more epochs or rows, or set both to 0."
        )


def renamed_keys(records: Iterable[Record]) -> list[str]:
    """Say how rows were understood whose keys are not this package's own."""
    lines = [line for line in readings(records) if " from " in line]
    return [f"training rows, as they were understood: {line}" for line in lines]


def idle_options(run: RunConfig, rows: Rows) -> list[str]:
    """Say which options of a run can have no effect."""
    settings = run.train
    an_epoch = steps_per_epoch(len(rows.train), settings.effective_batch)
    total_steps = settings.total_steps(an_epoch)
    patience = run.validate.early_stop_patience
    num_validations = math.ceil(total_steps / (run.validate.every or an_epoch))
    said = []
    if run.data.template != AUTO and rows.template == VERBATIM:
        said.append("data.template has no effect: no row is a conversation")
    if settings.max_steps > total_steps:
        said.append(
            f"train.max_steps has no effect: got {settings.max_steps}, and the run has only "
            f"{total_steps} steps"
        )
    if settings.warmup_steps >= total_steps:
        said.append(
            f"the learning rate never arrives: train.warmup_steps is {settings.warmup_steps}, and "
            f"the run has only {total_steps} steps"
        )
    if not rows.valid:
        chosen = [name for name, value in asdict(run.validate).items() if value]
        said += [f"validate.{name} has no effect: there are no validation rows" for name in chosen]
    elif patience >= num_validations:
        said.append(
            f"validate.early_stop_patience has no effect: got {patience}, and the run has only "
            f"{num_validations} validations"
        )
    return said


def check_disk(run: RunConfig, model: Network, out: Path | None) -> None:
    """Refuse to start if checkpoints cannot be written, or will not fit on the disk.

    Raises:
        StorageError: there is less space than a run needs, or MLX cannot write there.
    """
    if out:
        if not is_utf8(str(out.resolve())):
            raise StorageError(
                f"{out}: MLX writes only to paths in UTF-8, and this one is not.\n"
                "Choose another folder, or rename what it is in.",
                "out",
            )
        with scratch_file(out / "checkpoint") as temporary:
            save_tensors(temporary, {"nothing": mx.zeros(1)}, {})
        check_free_space(out, disk_bytes(run, model))


def plan(
    run: RunConfig, model: Network, rows: Rows, state: State | None, num_ranks: int
) -> MemoryPlan:
    """Plan a run's memory, on one of the ranks that share its steps.

    Raises:
        BackendError: not even the longest row fits.
    """
    here, widths = backend.machine(), widths_of(model)
    dtype = backend.resolve_dtype(run.model.dtype)
    recomputes = run.train.gradient_checkpointing
    scores, widened = attention_of(model, dtype)

    def bytes_per_token(width: int, num_streams: int) -> int:
        if here.path == "cpu":
            return cpu_bytes_per_token(widths, width, dtype.size, scores, recomputes, num_streams)
        return gpu_bytes_per_token(widths, width, dtype.size, widened, scores, recomputes)

    others = [row.other for row in rows.all if isinstance(row, Judged)]

    def planned(token_budget: int) -> MemoryPlan:
        return plan_memory(
            model,
            rows.all + others,
            math.ceil(run.train.effective_batch / num_ranks),
            bytes_per_token,
            gradient_checkpointing=recomputes,
            memory_bytes=memory_for(run),
            executor=choose_executor(),
            token_budget=token_budget,
            keeps_best=bool(rows.valid),
            num_single=num_single(run.train.optimizer, model),
        )

    kept = state.token_budget if state else 0
    if kept and num_ranks > 1:  # it may be that of a larger machine
        kept = min(kept, planned(0).token_budget)
    return planned(kept)


def changed_versions(began: dict[str, str]) -> list[str]:
    """Say what else has changed since a run was saved.

    The run goes on all the same. The state means the same to every version that can
    read it, and hours of training are worth more than the last digits.
    """
    changed = [
        f"{name} {began.get(name)} -> {value}"
        for name, value in versions().items()
        if began.get(name) != value
    ]
    if not changed:
        return []
    return [
        f"changed since the run was saved: {', '.join(changed)}; "
        "its last digits may differ from those without the change"
    ]
