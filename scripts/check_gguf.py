"""Are the tensors of a GGUF file those of the model folder that it was converted from?

    pip install gguf
    python llama.cpp/convert_hf_to_gguf.py models/coach --outfile coach.gguf --outtype f32
    python scripts/check_gguf.py models/coach coach.gguf

For networks built like llama. llama.cpp stores the rows of queries and keys in another order,
which is undone here.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from interviewmate_mlx import backend  # noqa: F401  its BLAS must be loaded before MLX

# isort: split
import mlx.core as mx

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hub_name(name: str) -> str:
    """The Hub's name of a tensor of GGUF."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block:
        return f"model.layers.{block[1]}.{NAMES[block[2]]}.weight"
    return f"{NAMES[name.removesuffix('.weight')]}.weight"


def by_halves(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """The rows of each head as llama.cpp has them: first and second half in turn."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    config = json.loads((args.folder / "config.json").read_text(encoding="utf-8"))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = {}
    for path in args.folder.glob("model*.safetensors"):
        weights |= mx.load(str(path))
    seen, wrong = set(), []
    for tensor in GGUFReader(args.file).tensors:
        if tensor.name.startswith("rope"):
            continue
        name = hub_name(tensor.name)
        expected = np.array(weights[name].astype(mx.float32))
        kind = name.split(".")[-2]
        if kind in heads:
            expected = by_halves(expected, heads[kind])
        if not np.array_equal(np.asarray(tensor.data).reshape(expected.shape), expected):
            wrong.append(name)
        seen.add(name)
    missing = sorted(set(weights) - seen)
    print(f"{len(seen)} tensors, {len(wrong)} differ, {len(missing)} missing")
    sys.exit(1 if wrong or missing else 0)


if __name__ == "__main__":
    main()
