"""A full-size Falcon-RW-1B with random weights: the work of the real one without its download.

A speed depends on shapes and on how long the rows are, not on what the weights
say. So the shapes are the Hub's, the tokenizer is a byte-level BPE of GPT-2's
size, and the weights are drawn from one seed.
"""

import json
import lzma
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from interviewmate_mlx.config import shipped
from interviewmate_mlx.data.records import load_splits
from interviewmate_mlx.files import atomic_file, atomic_folder
from interviewmate_mlx.formats.cast import cast
from interviewmate_mlx.formats.safetensors_file import safetensors_header

END = "<|endoftext|>"
NUM_TOKENS = 50257
CONFIG = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "alibi": True,
    "bias": True,
    "multi_query": False,
    "parallel_attn": False,
    "new_decoder_architecture": False,
    "apply_residual_connection_post_layernorm": False,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "vocab_size": 50304,
    "layer_norm_epsilon": 1e-5,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "torch_dtype": "bfloat16",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_STD = 0.02  # transformers' `initializer_range`
_CHUNK = 1 << 20  # numbers at a time


def random_base(
    cache: Path, tokenizer: Path | None, corpus: Path | None, num_layers: int = 0
) -> Path:
    """The folder of the base below `cache`, in the Hub's layout, made when it is not there.

    Args:
        cache: a folder.
        tokenizer: a folder with a `tokenizer.json`; None trains one.
        corpus: text to train it on beside the questions: a .txt or .txt.xz file, or a
            folder of such.
        num_layers: fewer than the Hub's, if not 0.
    """
    config = CONFIG | ({"num_hidden_layers": num_layers} if num_layers else {})
    folder = cache / f"falcon-rw-1b-random{f'-{num_layers}-layers' if num_layers else ''}"
    if not (folder / "config.json").is_file():
        with atomic_folder(folder) as temporary:
            write_weights(temporary / "model.safetensors", config)
            (temporary / "config.json").write_text(json.dumps(config, indent=2))
            write_tokenizer(temporary, tokenizer, corpus)
    elif (folder / "tokenizer_source.txt").read_text() != _source(tokenizer, corpus):
        write_tokenizer(folder, tokenizer, corpus)
    return folder


def write_weights(path: Path, config: dict[str, Any], seed: int = 0) -> None:
    """All tensors in bfloat16, a piece at a time: norms' weights around 1, the rest around 0."""
    shapes = list(_tensors(config))
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        tensors = [(name, "bfloat16", shape) for name, shape in shapes]
        file.write(safetensors_header(tensors, {"format": "pt"}))
        for name, shape in shapes:
            mean = 1.0 if "norm.weight" in name or "ln_f.weight" in name else 0.0
            for start in range(0, size := math.prod(shape), _CHUNK):
                noise = rng.standard_normal(min(_CHUNK, size - start), dtype=np.float32)
                numbers = mean + np.float32(_STD) * noise
                file.write(cast(numbers.astype("<f4").data.cast("B"), "float32", "bfloat16"))


def write_tokenizer(folder: Path, tokenizer: Path | None, corpus: Path | None) -> None:
    """Copy a folder's tokenizer, or train one, and keep where it comes from beside it."""
    if tokenizer:
        for name in TOKENIZER_FILES:
            with atomic_file(folder / name) as temporary:
                shutil.copyfile(tokenizer / name, temporary)
    else:
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
        with atomic_file(folder / "tokenizer.json") as temporary:
            _train_tokenizer(corpus).save(str(temporary))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "GPT2Tokenizer", **special})
        )
    (folder / "tokenizer_source.txt").write_text(_source(tokenizer, corpus))


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    C, V = config["hidden_size"], config["vocab_size"]
    yield "transformer.word_embeddings.weight", (V, C)
    for number in range(config["num_hidden_layers"]):
        block = f"transformer.h.{number}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}{norm}.weight", (C,)
            yield f"{block}{norm}.bias", (C,)
        for linear, shape in {
            "self_attention.query_key_value": (3 * C, C),
            "self_attention.dense": (C, C),
            "mlp.dense_h_to_4h": (4 * C, C),
            "mlp.dense_4h_to_h": (C, 4 * C),
        }.items():
            yield f"{block}{linear}.weight", shape
            yield f"{block}{linear}.bias", shape[:1]
    yield "transformer.ln_f.weight", (C,)
    yield "transformer.ln_f.bias", (C,)


def _train_tokenizer(corpus: Path | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        # Even the questions alone then give rows within 3 % of a 50,257-token BPE of other text.
        min_frequency=2,
        special_tokens=[AddedToken(END, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    return tokenizer


def _texts(corpus: Path | None) -> Iterator[str]:
    for records in load_splits(shipped("data/interview")).values():
        for record in records:
            yield from (message.content for message in record.messages)
    if corpus:
        files = [corpus] if corpus.is_file() else sorted(corpus.glob("*.txt*"))
        for path in files:
            opener = lzma.open if path.suffix == ".xz" else open
            with opener(path, "rt", encoding="utf-8") as file:
                yield from file


def _source(tokenizer: Path | None, corpus: Path | None) -> str:
    if tokenizer:
        return f"from {tokenizer.resolve()}"
    return f"trained on the questions and {corpus.resolve() if corpus else 'nothing else'}"
