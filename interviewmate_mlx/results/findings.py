"""What runs show, in sentences that follow from their numbers by rules that stand here.

Each function returns sentences; none where its rule does not hold.
"""

import statistics
from collections.abc import Sequence

from interviewmate_mlx.results.runs import FinishedRun, smoothed

# Last tenth of the steps against the tenth before: a fall of this share is a fall.
_STILL_FALLING = 0.01
# The last validation loss above the best one by this share: the run has learned its rows by heart.
_OVERFIT = 0.005
# Neither loss has fallen by this share: nothing has moved.
_MOVED = 0.01
_CLIPPED = 0.5  # the share of steps whose gradient was clipped
_FEW_STEPS = 20  # with fewer the tenths say nothing


def differing(runs: Sequence[FinishedRun]) -> dict[str, list[object]]:
    """The settings in which runs differ, each with its value in every run."""
    settings = [run.settings() for run in runs]
    return {
        key: [of_run[key] for of_run in settings]
        for key in settings[0]
        if any(of_run[key] != settings[0][key] for of_run in settings)
    }


def are_comparable(runs: Sequence[FinishedRun]) -> list[str]:
    """Why the validation losses of runs cannot be compared; nothing if they can."""
    reasons = []
    for key, what in (
        ("model.base", "bases"),
        ("data.path", "data"),
        ("data.max_length", "row lengths"),
        ("data.train_on", "parts of a row that carry loss"),
        ("train.method", "methods"),
        *((key, f"values of {key}") for key in runs[0].settings() if key.startswith("preference.")),
    ):
        values = dict.fromkeys(str(run.settings()[key]) for run in runs)
        if len(values) > 1:
            reasons.append(f"They have different {what}: {', '.join(values)}.")
    return reasons


def best_run(runs: Sequence[FinishedRun]) -> FinishedRun | None:
    """The run with the lowest validation loss; None if they cannot be compared or have none."""
    measured = [run for run in runs if run.loss is not None]
    if not measured or are_comparable(runs):
        return None
    return min(measured, key=lambda run: run.loss or 0.0)


def seed_groups(runs: Sequence[FinishedRun]) -> list[list[FinishedRun]]:
    """Runs that differ in their seed alone, together."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        rest = {key: value for key, value in run.settings().items() if key != "train.seed"}
        groups.setdefault(repr(rest), []).append(run)
    return list(groups.values())


def which_to_use(runs: Sequence[FinishedRun]) -> list[str]:
    """Which run to use, and how sure that is."""
    if reasons := are_comparable(runs):
        return ["Their validation losses cannot be compared.", *reasons]
    best = best_run(runs)
    if best is None:
        return ["No run has validation rows, so none can be called the best."]
    loss = best.loss or 0.0
    said = [f"Use {best.name}: its validation loss of {loss:.4f} is the lowest."]
    if len(runs) == 1:
        said = [f"There is one run, {best.name}, with a validation loss of {loss:.4f}."]
    base = best.summary.base_valid_loss
    if base is not None:
        if loss < base:
            said.append(f"Its base had {base:.4f}.")
        else:
            said.append(f"Its base had {base:.4f}, so training is no better than none.")
    groups = [group for group in seed_groups(runs) if len(group) > 1]
    spreads = [_spread(group) for group in groups]
    others = [run for run in runs if run is not best and run.loss is not None]
    apart = [run for run in others if not any(best in g and run in g for g in groups)]
    if spreads and apart:
        spread, second = max(spreads), min(apart, key=lambda run: run.loss or 0.0)
        gap = (second.loss or 0.0) - loss
        if gap > spread:
            said.append(
                f"The next one, {second.name}, is {gap:.4f} above it, more than seeds make "
                f"({spread:.4f})."
            )
        else:
            said.append(
                f"The next one, {second.name}, is {gap:.4f} above it, and seeds alone make "
                f"{spread:.4f}: the two cannot be told apart."
            )
    elif apart:
        said.append(
            "How much of the difference is chance is not known: no run was repeated with other "
            "seeds (imate-mlx sweep --seeds 3)."
        )
    return said


def _spread(group: Sequence[FinishedRun]) -> float:
    losses = [run.loss for run in group if run.loss is not None]
    return max(losses) - min(losses) if losses else 0.0


def seeds_in_words(runs: Sequence[FinishedRun]) -> list[str]:
    """Mean and spread of runs that differ in their seed alone."""
    said = []
    for group in seed_groups(runs):
        losses = [run.loss for run in group if run.loss is not None]
        if len(losses) > 1:
            names = ", ".join(run.name for run in group)
            said.append(
                f"{names} differ in their seed alone: validation loss "
                f"{statistics.mean(losses):.4f} in the mean, "
                f"{min(losses):.4f} to {max(losses):.4f}."
            )
    return said


def effects(runs: Sequence[FinishedRun]) -> list[str]:
    """What each setting did, where runs differ in it alone; else what is mixed up with what."""
    if len(runs) < 2 or are_comparable(runs):
        return []
    said, alone, mixed = [], set(), set()
    for number, one in enumerate(runs):
        for other in runs[number + 1 :]:
            changed = differing([one, other])
            keys = [key for key in changed if key != "train.seed"]
            if len(keys) == 1 and one.loss is not None and other.loss is not None:
                alone.add(keys[0])
                before, after = changed[keys[0]]
                said.append(
                    f"{keys[0]} {_shown(before)} -> {_shown(after)}, all else alike "
                    f"({one.name}, {other.name}): validation loss {one.loss:.4f} -> "
                    f"{other.loss:.4f} ({other.loss - one.loss:+.4f})."
                )
            elif len(keys) > 1:
                mixed |= set(keys)
    if mixed - alone:
        said.append(
            f"{_listed(sorted(mixed - alone))} changed together, so what each of them did cannot "
            "be told (confounded). Runs that differ in one of them alone would tell."
        )
    return said


def next_steps(run: FinishedRun) -> list[str]:
    """What to try next, by rules."""
    said = []
    if not run.is_complete:
        said.append(
            f"{run.name} was interrupted after {run.summary.steps} of {run.total_steps} steps: "
            f"imate-mlx train --resume --out {run.folder} goes on."
        )
    if overfit := _overfit(run):
        said.append(overfit)
    elif (fall := _last_fall(run)) > _STILL_FALLING and run.is_complete:
        said.append(
            f"{run.name} was still learning at its end: over the last tenth of its steps the "
            f"training loss fell by another {fall:.1%}. Try more epochs."
        )
    clipped = statistics.mean(
        0 < run.run.train.max_grad_norm < line["grad_norm"] for line in run.steps
    )
    if clipped > _CLIPPED:
        said.append(
            f"In {clipped:.0%} of the steps of {run.name} the gradient was clipped to "
            f"{run.run.train.max_grad_norm:g}: the steps are shorter than the learning rate says. "
            "Try a larger train.max_grad_norm, or a lower learning rate."
        )
    if _has_not_moved(run):
        said.append(
            f"{run.name} has hardly moved: its losses fell by less than {_MOVED:.0%}. Try a higher "
            "learning rate."
        )
    return said


def _last_fall(run: FinishedRun) -> float:
    losses = [line["loss"] for line in run.steps]
    tenth = len(losses) // 10
    if len(losses) < _FEW_STEPS:
        return 0.0
    before, last = (
        statistics.mean(part) for part in (losses[-2 * tenth : -tenth], losses[-tenth:])
    )
    return float((before - last) / before)


def _overfit(run: FinishedRun) -> str:
    best, best_step = run.loss, run.summary.best_step
    if best is None or best_step is None or not run.validations:
        return ""
    last_step, last = run.validations[-1]
    losses = smoothed(run.curve("loss"))
    has_fallen = losses[-1][1] < losses[min(best_step, len(losses)) - 1][1]
    if last_step <= best_step or last <= best * (1 + _OVERFIT) or not has_fallen:
        return ""
    saved_s = sum(line["timing"]["elapsed_s"] for line in run.steps if line["step"] > best_step)
    return (
        f"{run.name} learned its rows by heart after step {best_step}: its validation loss rose "
        f"from {best:.4f} to {last:.4f} while the training loss fell on. An early stop "
        f"(validate.early_stop_patience) would have saved up to {saved_s / 60:.1f} minutes; more "
        "rows would help more."
    )


def _has_not_moved(run: FinishedRun) -> bool:
    base, best = run.summary.base_valid_loss, run.loss
    gained = (base - best) / base if base and best is not None else run.summary.reduction
    return run.summary.reduction < _MOVED and gained < _MOVED


def curve_title(runs: Sequence[FinishedRun]) -> str:
    """What a plot of the training losses shows."""
    if len(runs) == 1:
        (run,) = runs
        first, last = run.summary.first_loss, run.summary.final_loss
        return f"The training loss of {run.name} goes from {first:.3f} to {last:.3f}"
    most = max(runs, key=lambda run: run.summary.reduction)
    return f"The training loss falls most in {most.name}, by {most.summary.reduction:.1%}"


def validation_title(runs: Sequence[FinishedRun]) -> str:
    """What a plot of the validation losses shows."""
    measured = [run for run in runs if run.loss is not None]
    if not measured:
        return "No run has validation rows"
    best = min(measured, key=lambda run: run.loss or 0.0)
    if are_comparable(runs):
        return "Validation losses, each of its own data or base"
    return f"The validation loss is lowest in {best.name}: {best.loss:.4f} (marked: the best step)"


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
