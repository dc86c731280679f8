"""The whole job in a minute, with no network: convert, train, generate, export.

The base is a toy made on the spot: Falcon-RW's architecture at a few thousandths
of its size, with random weights. It shows that the job works, not what a coach
says: the toy's answers are noise, before and after.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from interviewmate_mlx import backend  # noqa: F401  its BLAS must be loaded before MLX

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from interviewmate_mlx.config import shipped
from interviewmate_mlx.data.records import load_splits
from interviewmate_mlx.model.falcon import Model, ModelArgs

CHECKPOINT, BASE, ADAPTER = Path("models/toy-checkpoint"), "models/toy", "adapters/demo"
CONFIG = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "alibi": True,
    "bias": True,
    "multi_query": False,
    "parallel_attn": False,
    "new_decoder_architecture": False,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 2048,
    "layer_norm_epsilon": 1e-5,
}
END = "<|endoftext|>"


def write_toy_checkpoint(folder: Path) -> None:
    """Random weights, and a byte-level BPE of the shipped questions, as the Hub would hold them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = load_splits(shipped("data/interview"))["train"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[AddedToken(END, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message.content for row in rows for message in row.messages)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", **special})
    )
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    mx.random.seed(0)
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(CONFIG)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})


def run(*arguments: str) -> None:
    """Run an `imate-mlx` command in a process of its own, and show it."""
    print(f"\n$ imate-mlx {subprocess.list2cmdline(arguments)}", flush=True)
    program = Path(sys.executable).with_name("imate-mlx")
    subprocess.run([str(program), *arguments], check=True)


def main() -> None:
    shutil.rmtree(CHECKPOINT, ignore_errors=True)
    write_toy_checkpoint(CHECKPOINT)
    run("convert", str(CHECKPOINT), "--out", BASE, "--force")
    run("train", "--run", "A", "--model", BASE, "--out", ADAPTER, "--force")
    question = load_splits(shipped("data/interview"))["test"][0].messages[0].content
    run("generate", question, "--model", BASE, "--max-tokens", "24")
    run("generate", question, "--adapter", ADAPTER, "--max-tokens", "24")
    print(
        f"""
The toy's words are noise; the adapter in {ADAPTER} is a true PEFT folder all the same.
The same five steps on the real model:

    imate-mlx convert tiiuae/falcon-rw-1b
    imate-mlx train --run A
    imate-mlx generate "What is overfitting?" --adapter adapters/run_A
    imate-mlx bench --run A
    imate-mlx export adapters/run_A --push you/interview-coach"""
    )


if __name__ == "__main__":
    main()
