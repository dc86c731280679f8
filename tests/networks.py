"""Small random networks of many architectures, as transformers saves them."""

import json
from pathlib import Path
from typing import Any

import torch
from checkpoints import END_OF_TEXT, write_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

_SHAPE = {
    "vocab_size": 400,  # more than the tokenizer has
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # so that every part of it matters
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
# What each has beside the shape. A window of 8 is shorter than the rows of the tests.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "cohere": {},
    "cohere2": {"sliding_window": 8},
    "ernie4_5": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "num_hidden_layers": 7,
    },
    "glm4": {"head_dim": 16},
    "granite": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
    },
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "llama": {},
    "mistral": {"sliding_window": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "olmoe": _EXPERTS,
    "phi": {},
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen2_moe": {
        **_EXPERTS,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3": {"head_dim": 16},
    "seed_oss": {"head_dim": 16},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 64},
}


def random_network(model_type: str, **changes: Any) -> Any:
    """transformers' network with random weights, in float32; biases and norms are random too."""
    settings = {**_SHAPE, **ARCHITECTURES[model_type], **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.float()


def write_network(folder: Path, model_type: str, **changes: Any) -> Any:
    """Write a random network with a tokenizer, as the Hub has it; return transformers' own."""
    model = random_network(model_type, **changes)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "LlamaTokenizerFast"  # a class that is not asked
    path.write_text(json.dumps(settings), encoding="utf-8")
    assert settings["eos_token"] == END_OF_TEXT
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    config = {key: value for key, value in config.items() if value is not None}
    path.write_text(json.dumps(config), encoding="utf-8")
