"""What quantising a base gives: bytes on the disk, planned memory, and how far its logits move.

    python benchmarks/quantised.py FOLDER                 8 and 4 bits, groups of 64
    python benchmarks/quantised.py FOLDER --rows 256      Run A's LoRA on rows of 256 tokens

FOLDER is a base as the Hub has it. Logits are those of random tokens, against bfloat16's. Memory is
planned as on a GPU with fused attention, one row at a time; nothing is trained.
"""

import argparse
import tempfile
from pathlib import Path

from interviewmate_mlx import backend  # noqa: F401  its BLAS must be loaded before MLX

# isort: split
import mlx.core as mx
import numpy as np

from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.base.merged import write_merged
from interviewmate_mlx.base.quantization import Quantization
from interviewmate_mlx.model.gpu_kernels import fused_width
from interviewmate_mlx.model.lora import add_lora
from interviewmate_mlx.training.memory import (
    SCORES_FUSED,
    gpu_bytes_per_token,
    weight_bytes,
    widths_of,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=512, help="tokens of a row")
    parser.add_argument("--tokens", type=int, default=32, help="whose logits are compared")
    options = parser.parse_args()
    reference = None
    for bits in (None, *options.bits):
        quantization = Quantization.of(bits, options.group_size) if bits else None
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary, "base")
            converted = convert(options.folder, out, dtype="bfloat16", quantization=quantization)
            planned = planned_bytes(out, options.rows)
            logits = logits_of(out, Path(temporary, "plain"), options.tokens)
        reference = logits if reference is None else reference
        moved, size = (float(np.sqrt(np.mean(a**2))) for a in (logits - reference, reference))
        kind = f"{bits} bits" if bits else "bfloat16"
        print(
            f"{kind}: {converted.nbytes / 1e9:.2f} GB on the disk, "
            f"{planned / 1e9:.1f} GB planned, logits moved by {moved:.3f} of {size:.2f}"
        )


def planned_bytes(folder: Path, width: int) -> int:
    """Memory of Run A's LoRA with one row at a time."""
    model = Base.open(folder).build(mx.bfloat16)
    add_lora(model, model.attention_targets, 8, 16, 0.05)
    widths = widths_of(model)
    widened = fused_width(model) or widths.head_dim
    return weight_bytes(model) + width * gpu_bytes_per_token(
        widths, width, 2, widened, SCORES_FUSED
    )


def logits_of(folder: Path, plain: Path, num_tokens: int) -> np.ndarray:
    """Logits in bfloat16, (L, V). Through the dequantised weights: on a CPU that is faster."""
    base = Base.open(folder)
    if base.quantization:
        plain.mkdir()
        write_merged(plain, base, {})
        base = Base.open(plain)
    ids = np.random.default_rng(0).integers(0, len(base.tokenizer.get_vocab()), (1, num_tokens))
    logits = base.load(mx.bfloat16)(mx.array(ids)).astype(mx.float32)
    return np.array(logits, np.float64)[0]


if __name__ == "__main__":
    main()
