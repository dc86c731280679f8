"""For pretrain.py: an empty base to begin with; the trained one as the Hub has it, with a card."""

import argparse
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import stream_generate
from mlx_lm.sample_utils import make_sampler
from pretrain_text import Text

from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.converted import write_json, write_tokenizer
from interviewmate_mlx.base.tokenizer import read_tokenizer_files
from interviewmate_mlx.data.prompts import pack_texts
from interviewmate_mlx.data.records import load_splits
from interviewmate_mlx.errors import TrainingError
from interviewmate_mlx.evaluation.loss import row_losses, score
from interviewmate_mlx.files import atomic_folder
from interviewmate_mlx.formats.json_file import read_json
from interviewmate_mlx.model.falcon import Model, ModelArgs
from interviewmate_mlx.model.tree import named_arrays

PROMPTS = (
    "Gradient descent is",
    "The validation set is used to",
    "In order to avoid overfitting,",
    "A transformer is a neural network that",
)


def falcon_config(args: argparse.Namespace) -> dict[str, Any]:
    """config.json, with the keys that tell a Falcon-RW from the other Falcons."""
    end_id = args.vocab - 1
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "alibi": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "bias": True,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "hidden_dropout": 0.0,
        "hidden_size": args.hidden,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "multi_query": False,
        "new_decoder_architecture": False,
        "num_attention_heads": args.heads,
        "num_hidden_layers": args.layers,
        "parallel_attn": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": args.vocab,
    }


def shape_of(folder: Path) -> dict[str, int]:
    """The sizes of a base that `write_folder` wrote, by the names of the options.

    Raises:
        TrainingError: it is another kind of base.
    """
    config = read_json(folder / "config.json")
    keys = {
        "vocab": "vocab_size",
        "hidden": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
    }
    shape = {option: config.get(key, 0) for option, key in keys.items()}
    is_ours = all(shape.values()) and config == falcon_config(argparse.Namespace(**shape))
    if not is_ours or not (folder / "README.md").is_file():
        raise TrainingError(
            f"{folder} is no base of this script: it has another config.json, or no card.\n"
            "Give a folder that this script wrote."
        )
    return shape


def write_start(args: argparse.Namespace, tokenizer: Path, folder: Path) -> Path:
    """A base in float32 that knows nothing, with GPT-2's start, unless it is there.

    There, what adds to the residual begins smaller.
    """
    if folder.is_dir():
        return folder
    mx.random.seed(args.seed)
    model = Model(ModelArgs.from_dict(falcon_config(args)))
    start = {}
    for name, array in named_arrays(model.parameters()).items():
        start[name] = mx.zeros(array.shape) if name.endswith("bias") else array
        if array.ndim == 2:
            adds = name.endswith(("self_attention.dense.weight", "dense_4h_to_h.weight"))
            scale = 0.02 / math.sqrt(2 * args.layers) if adds else 0.02
            start[name] = scale * mx.random.normal(array.shape)
    with atomic_folder(folder) as temporary:
        write_base(temporary, falcon_config(args) | {"torch_dtype": "float32"}, tokenizer, start)
    return folder


def write_base(
    folder: Path, config: dict[str, Any], tokenizer: Path, weights: dict[str, mx.array]
) -> None:
    write_tokenizer(folder, read_tokenizer_files(tokenizer))
    write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(folder / "generation_config.json", ids)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})


def write_folder(args: argparse.Namespace, texts: Sequence[Text], made: Path, steps: int) -> None:
    """Write `args.out`, whole or not at all. The card's figures are those of the weights in it."""
    weights = weights_of(made)
    if args.blend != 1:  # between what it was and what it became: arxiv.org/abs/2109.01903
        before = weights_of(args.start)
        weights = {n: (1 - args.blend) * before[n] + args.blend * w for n, w in weights.items()}
    weights = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    with atomic_folder(args.out) as folder:
        write_base(folder, falcon_config(args), texts[0].tokenizer, weights)
        card = model_card(args, texts, steps, Base.open(folder))
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_checksums(folder)


def weights_of(folder: Path) -> dict[str, mx.array]:
    """A base's weights by parameter path, float32."""
    return named_arrays(Base.open(folder).load(mx.float32).parameters())


def write_checksums(folder: Path) -> None:
    """What `sha256sum -c SHA256SUMS` reads."""
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def model_card(args: argparse.Namespace, texts: Sequence[Text], steps: int, base: Base) -> str:
    """README.md: what the model is, how it was made, how good it is, and what it is not."""
    model = base.load(mx.float32)
    num_parameters = sum(array.size for array in named_arrays(model.parameters()).values())
    facts = recipe_facts(args, texts, steps, num_parameters)
    for text in texts:
        if not text.num_held_out:
            continue
        records = load_splits(text.held_out)["train"]
        rows = pack_texts(base.tokenizer, records, args.width + 1)
        found = score(row_losses(model, rows))
        bits = found.loss * found.tokens / math.log(2) / text.held_out_bytes
        facts[f"held out of {text.name}"] = (
            f"{found.loss:.4f} nats a token, perplexity {found.perplexity:.2f}, "
            f"{bits:.4f} bits a byte"
        )
    sources = args.sources.read_text(encoding="utf-8") if args.sources else "Not stated."
    card = Path(__file__).with_name("pretrain_card.md").read_text(encoding="utf-8")
    return card.format(
        name=args.out.name,
        width=args.width,
        table="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        samples="\n\n".join(sample(model, base.tokenizer)),
        sources=re.sub("^# .*\n", "", sources).strip(),  # the card has a heading for them
    )


def recipe_facts(
    args: argparse.Namespace, texts: Sequence[Text], steps: int, num_parameters: int
) -> dict[str, str]:
    """How the model was made, for the card. First comes how the base it went on from was made."""
    late = math.ceil(args.then_tokens / (args.rows * args.width))
    rate = f"{args.learning_rate:g} after {args.warmup:.0%} warmup, "
    is_level = late and args.tokens
    rate += f"level, and in the last {late:,} steps linear to 0" if is_level else "then linear to 0"
    facts = {
        "parameters": f"{num_parameters:,}, the tied head counted once; stored in bfloat16",
        "shape": f"{args.layers} layers, hidden size {args.hidden}, {args.heads} heads of "
        f"{args.hidden // args.heads}, {args.vocab} tokens",
        "text": f"{texts[0].num_train:,} tokens to learn from; every hundredth document, "
        f"{texts[0].num_held_out:,} tokens, held out",
        "tokens seen": f"{steps * args.rows * args.width:,}: {steps:,} steps of {args.rows} packed "
        f"rows of {args.width} tokens",
        "optimizer": "Muon for the matrices of the blocks, AdamW for the rest; learning rate "
        f"{rate}; weight decay {args.weight_decay:g}; gradients clipped to "
        f"{args.max_grad_norm:g}; seed {args.seed}",
    }
    if late:
        facts["second stage"] = (
            f"the last {late:,} steps, {args.then_share:.0%} of their tokens from {texts[1].name} "
            f"({texts[1].num_train:,} tokens to learn from, {texts[1].num_held_out:,} held out)"
        )
    if args.unlikelihood:
        facts["against repetition"] = (
            f"unlikelihood of tokens that would complete a pair the row has already, times "
            f"{args.unlikelihood:g}"
        )
    if args.blend != 1:
        facts["stored"] = f"{args.blend:.0%} of the weights after this, {1 - args.blend:.0%} before"
    if not args.start:
        return facts
    earlier = dict(re.findall(r"^\| (?!held out)(\w.*?) \| (.+) \|$", read_card(args.start), re.M))
    same = ("parameters", "shape", "text")
    again = "afterwards"
    while any(name.startswith(f"{again}: ") for name in earlier):
        again += " again"
    later = {f"{again}: {name}": value for name, value in facts.items() if name not in same}
    return {name: facts[name] for name in same} | earlier | later


def read_card(folder: Path) -> str:
    """The first part of a card, which says how its model was made."""
    return (folder / "README.md").read_text(encoding="utf-8").partition("## Samples")[0]


def sample(model: Model, tokenizer: Any) -> list[str]:
    """How the model goes on from a few prompts: with a fixed seed, none picked out."""
    mx.random.seed(0)
    sampler = make_sampler(temp=0.7, top_p=0.9)
    samples = []
    for prompt in PROMPTS:
        pieces = stream_generate(model, tokenizer, prompt, max_tokens=80, sampler=sampler)
        # Decoded together: streamed text has lost the space before its first word.
        text = tokenizer.decode([piece.token for piece in pieces], skip_special_tokens=True)
        samples.append(f"> **{prompt}**{text.rstrip()}".replace("\n", "\n> "))
    return samples
