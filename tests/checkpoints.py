"""Tiny Falcon-RW checkpoints in the Hub's layouts, built by transformers and tokenizers."""

import json
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import FalconConfig, FalconForCausalLM

from interviewmate_mlx.model.falcon import Model, ModelArgs

END_OF_TEXT = "<|endoftext|>"

CORPUS = [
    "Question: What is the difference between supervised and unsupervised learning?",
    "Answer: Supervised learning fits a function to labelled examples, unsupervised learning "
    "finds structure in examples that bear no label.",
    "Question: How does gradient descent find the minimum of a loss?",
    "Answer: It takes small steps against the gradient, and the learning rate sets their length.",
    "Question: Why is a validation set kept apart from the training set?",
    "Answer: Because a model is judged on rows that it has not been trained on.",
    "Tell me about a time you had to explain a hard idea to somebody without your background.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "The attention scores are scaled by 1 / sqrt(head_dim) so that the softmax keeps its gradient.",
]

Format = Literal["bin", "sharded_bin", "safetensors", "sharded"]


def write_tokenizer(folder: Path, vocab_size: int = 384) -> Path:
    """Train a byte-level BPE of `vocab_size` tokens and write it as the Hub's falcon-rw-1b has it.

    The last id is `<|endoftext|>`: beginning, end and unknown token at once; no pad token.
    `vocab_size` lies between 257 and about 500: the corpus is small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=1,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"] | {END_OF_TEXT: len(model["vocab"])}
    merges = [tuple(pair) for pair in model["merges"]]
    assert len(vocab) == vocab_size, f"the corpus yields only {len(vocab)} tokens"

    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))

    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    _write_json(folder / "special_tokens_map.json", special)
    settings = {"add_prefix_space": False, "model_max_length": 1024}
    _write_json(
        folder / "tokenizer_config.json", special | settings | {"tokenizer_class": "GPT2Tokenizer"}
    )
    return folder


def tiny_falcon(
    heads: int = 4,
    head_dim: int = 16,
    layers: int = 2,
    vocab_size: int = 384,
    bias: bool = True,
    seed: int = 0,
    **config: Any,
) -> FalconForCausalLM:
    """A Falcon-RW in float32 and eval mode, whose every parameter is random, biases and norms too.

    Its end-of-text id is 2, the trap that the Hub's own config lays.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": heads * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "alibi": True,
        "bias": bias,
        "multi_query": False,
        "parallel_attn": False,
        "new_decoder_architecture": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = FalconForCausalLM(FalconConfig(**settings | config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(noise * 0.1 + (1.0 if is_norm_scale else 0.0))
    return model


def our_model(reference: FalconForCausalLM | None = None) -> Model:
    """Our network in eval mode, with the weights of transformers' (by default `tiny_falcon()`)."""
    reference = reference or tiny_falcon()
    model = Model(ModelArgs.from_dict(reference.config.to_dict()))
    state = {name: mx.array(tensor.numpy()) for name, tensor in reference.state_dict().items()}
    model.load_weights(list(model.sanitize(state).items()))
    return model.eval()


def hub_config(model: FalconForCausalLM) -> dict[str, Any]:
    """config.json with the keys that the Hub's falcon-rw-1b has, and no others."""
    config = model.config
    hub = {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "apply_residual_connection_post_layernorm": False,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "transformers_version": "4.27.4",
    }
    keys = (
        "alibi attention_dropout bias bos_token_id eos_token_id hidden_dropout hidden_size "
        "initializer_range layer_norm_epsilon multi_query new_decoder_architecture "
        "num_attention_heads num_hidden_layers parallel_attn use_cache vocab_size"
    )
    hub |= {key: getattr(config, key) for key in keys.split()}
    if not config.tie_word_embeddings:
        hub["tie_word_embeddings"] = False
    return hub


def old_config(model: FalconForCausalLM) -> dict[str, Any]:
    """config.json in the names of the checkpoints of early 2023, with code of their own."""
    config = hub_config(model)
    del config["new_decoder_architecture"]
    for old, new in (
        ("n_layer", "num_hidden_layers"),
        ("n_head", "num_attention_heads"),
    ):
        config[old] = config.pop(new)
    return config | {
        "architectures": ["RWForCausalLM"],
        "model_type": "RefinedWebModel",
        "auto_map": {
            "AutoConfig": "configuration_RW.RWConfig",
            "AutoModelForCausalLM": "modelling_RW.RWForCausalLM",
        },
    }


def write_checkpoint(
    folder: Path,
    model: FalconForCausalLM,
    format: Format = "bin",
    *,
    config: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
    tokenizer_size: int | None = 384,
) -> Path:
    """Write a model folder as it lies on the Hub.

    Args:
        folder: made when it is not there.
        model: as `tiny_falcon` gives it, in any dtype (`.to(torch.bfloat16)`).
        format: which files hold the weights; a sharded one has four shards or so.
        config: config.json instead of `hub_config(model)`.
        state: tensors for the two `bin` formats instead of `model.state_dict()`.
        tokenizer_size: tokens of the tokenizer; None leaves it out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if format == "bin":
        torch.save(state or model.state_dict(), folder / "pytorch_model.bin")
    elif format == "sharded_bin":
        _write_bin_shards(folder, state or dict(model.state_dict()), num_bytes)
    else:
        shard_bytes = num_bytes * 2 if format == "safetensors" else num_bytes // 3
        model.save_pretrained(folder, max_shard_size=shard_bytes)
    _write_json(folder / "config.json", config or hub_config(model))
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
    _write_json(folder / "generation_config.json", generation)
    if tokenizer_size is not None:
        write_tokenizer(folder, tokenizer_size)
    return folder


def _write_bin_shards(folder: Path, state: dict[str, Any], num_bytes: int) -> None:
    names = list(state)
    count = 3
    weight_map = {}
    for number in range(count):
        shard = f"pytorch_model-{number + 1:05d}-of-{count:05d}.bin"
        mine = names[number * len(names) // count : (number + 1) * len(names) // count]
        torch.save({name: state[name].clone() for name in mine}, folder / shard)
        weight_map |= dict.fromkeys(mine, shard)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    _write_json(folder / "pytorch_model.bin.index.json", index)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
