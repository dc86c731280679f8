"""An adapter trained here, loaded by PEFT, saved by PEFT, and loaded here again.

    python examples/peft_round_trip.py                # in a temporary folder, which is removed
    python examples/peft_round_trip.py --out my_trip  # in a new folder, which stays

It needs torch, transformers and PEFT, which the extra `test` brings: pip install ".[cpu,test]".
It trains on `mini`, the small base that comes along, so it needs no network. On a Linux CPU
the first run on a machine takes longer than later ones, because MLX compiles its kernels then.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from interviewmate_mlx.adapter.folder import Adapter
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.config import load_run
from interviewmate_mlx.data.prompts import encode_question
from interviewmate_mlx.hub.names import shipped_base
from interviewmate_mlx.training.loop import train

# isort: split
import mlx.core as mx  # after this package, which loads a fast BLAS before MLX

try:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
except ModuleNotFoundError as error:
    sys.exit(f'{error}\nThis example needs torch and PEFT: pip install ".[cpu,test]"')

ROWS = [
    ("What is a loss?", "It tells how far the answers of a model are from its examples."),
    ("What is an epoch?", "One pass over every training row."),
    ("What is a token?", "Part of a word."),
    ("What is a learning rate?", "The length of a step."),
    ("What is a label?", "What a person says that an example shows."),
    ("What is a score?", "A number that says how good something is."),
    ("What is a mean?", "The sum of the values by their number."),
    ("What is a minimum?", "A place from which each small step leads up."),
]
QUESTION = "What is a gradient?"
TOLERANCE = 1e-4  # of a logit, float32: what the tests hold the whole network to


def train_adapter(folder: Path) -> Path:
    """Train a few steps on a few rows."""
    data, adapter = folder / "rows.jsonl", folder / "adapter"
    lines = [json.dumps({"question": asked, "answer": text}) for asked, text in ROWS]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    run = load_run("mini").replace("round_trip", data={"path": str(data)})
    for _ in train(run, adapter):
        pass  # `examples/own_loop.py` shows what could be done with the events
    return adapter


def our_logits(base: Base, adapter: Path | None, ids: list[int]) -> np.ndarray:
    """What this package computes for a prompt, with the adapter or without."""
    model = base.load(mx.float32)
    if adapter:
        Adapter.open(adapter).apply(model)
    return np.array(model.eval()(mx.array([ids])))


def peft_model(base_folder: Path, adapter: Path) -> PeftModel:
    """The same in PyTorch. transformers does not know the name `mini`, so it gets a folder."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(adapter)).eval()


def compare(what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    difference = float(np.abs(ours - theirs).max())
    print(f"{what}: logits differ by at most {difference:.1e}")
    if difference > TOLERANCE:
        sys.exit(f"expected at most {TOLERANCE:.0e}")


def main(folder: Path) -> None:
    # The adapter's folder is a PEFT folder as it lies. The base is written out for transformers.
    adapter = train_adapter(folder)
    mini = shipped_base("mini")
    assert mini
    base_folder = convert(mini, folder / "base").path

    base = Base.open("mini")
    ids = encode_question(base.tokenizer, QUESTION)
    plain, ours = our_logits(base, None, ids), our_logits(base, adapter, ids)
    print(f"the adapter changes logits by up to {np.abs(ours - plain).max():.1e}")

    # From here to PEFT.
    model = peft_model(base_folder, adapter)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits.numpy()
    compare("trained here, loaded by PEFT", ours, theirs)

    # And back: PEFT saves the adapter (it could have trained it further), and it is read here.
    # Without `save_embedding_layers=False` PEFT would look for `mini` on the Hub.
    model.save_pretrained(folder / "from_peft", save_embedding_layers=False)
    compare("saved by PEFT, loaded here", our_logits(base, folder / "from_peft", ids), theirs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a new folder to write to")
    out = parser.parse_args().out
    if out:
        out.mkdir(parents=True)
        main(out)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
