"""What a checkpoint of Run A costs, beside the epoch after which it is written.

    python benchmarks/checkpoint.py                 mini
    python benchmarks/checkpoint.py --model FOLDER  another base

Trains on four of the shipped rows, an epoch a step, in a folder that is removed. The first step,
in which the network is compiled, does not count.
"""

import argparse
import tempfile
import time
from pathlib import Path

from interviewmate_mlx import backend
from interviewmate_mlx.config import load_run
from interviewmate_mlx.data.batches import steps_per_epoch
from interviewmate_mlx.data.records import load_splits
from interviewmate_mlx.hub.names import fetch_data
from interviewmate_mlx.training.checkpoint import checkpoints
from interviewmate_mlx.training.events import Finished, Stepped, Validated
from interviewmate_mlx.training.loop import train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini", help="mini, or the folder of a base")
    options = parser.parse_args()
    print(backend.machine().device_name)
    run = load_run("A")
    data = fetch_data(run.data.path)
    step_s, save_s, size = last_step_and_save(options.model, data)
    num_steps = steps_per_epoch(len(load_splits(data)["train"]), run.train.effective_batch)
    print(
        f"checkpoint ({size / 1e6:.1f} MB) and adapter: {save_s:.2f} s; a step: {step_s:.2f} s; "
        f"so {save_s / (num_steps * step_s):.3%} of an epoch of {num_steps} steps"
    )


def last_step_and_save(model: str, data: Path) -> tuple[float, float, int]:
    """Seconds of the last step, of what is saved after it, and the checkpoint's bytes."""
    step_s = save_s = start = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("train", 4), ("valid", 1)):
            rows = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            Path(folder, f"{name}.jsonl").write_text("".join(rows[:count]), encoding="utf-8")
        out = Path(folder, "run")
        settings = [f"model.base={model}", f"data.path={folder}"]
        for event in train(load_run("A", settings), out):
            if isinstance(event, Stepped):
                step_s = event.elapsed_s
            if isinstance(event, Validated):  # then it is saved
                start = time.perf_counter()
            if isinstance(event, Finished):
                save_s = time.perf_counter() - start
        return step_s, save_s, checkpoints(out)[-1].stat().st_size


if __name__ == "__main__":
    main()
