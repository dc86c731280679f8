"""What a checkpoint of Run A costs, beside the epoch after which it is written.

    python benchmarks/checkpoint.py                 mini
    python benchmarks/checkpoint.py --model FOLDER  another base

Trains one step on four of the shipped rows, a few times, each in a folder that is removed.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from interviewmate_mlx import backend
from interviewmate_mlx.config import load_run
from interviewmate_mlx.data.batches import steps_per_epoch
from interviewmate_mlx.data.records import load_splits
from interviewmate_mlx.training.events import Saving, Stepped
from interviewmate_mlx.training.loop import train
from interviewmate_mlx.weights.names import find_data


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini", help="mini, or the folder of a base")
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    print(backend.prepare().device_name)
    steps, saves = [], []
    for _ in range(options.times):
        with tempfile.TemporaryDirectory() as folder:
            step_s, save_s, size = one_step(options.model, Path(folder))
        steps.append(step_s)
        saves.append(save_s)
    run = load_run("A")
    rows = load_splits(find_data(run.data.path))["train"]
    epoch_s = steps_per_epoch(len(rows), run.train.effective_batch) * median(steps)
    print(
        f"{size / 1e6:.1f} MB in {median(saves):.2f} s; a step takes {median(steps):.2f} s: "
        f"{median(saves) / epoch_s:.3%} of an epoch of Run A"
    )


def one_step(model: str, folder: Path) -> tuple[float, float, int]:
    """Seconds of a step, seconds of its checkpoint and adapter, and the checkpoint's bytes."""
    shipped = find_data(load_run("A").data.path) / "train.jsonl"
    rows = shipped.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(rows[:4]), encoding="utf-8")
    run = load_run("A", [f"model.base={model}", f"data.path={folder}"])
    step_s = start = 0.0
    for event in train(run, folder / "run", stop=lambda: True):
        if isinstance(event, Stepped):
            step_s = event.elapsed_s
        if isinstance(event, Saving):
            start = time.perf_counter()
    save_s = time.perf_counter() - start
    (checkpoint,) = (folder / "run/checkpoints").iterdir()
    return step_s, save_s, checkpoint.stat().st_size


if __name__ == "__main__":
    main()
