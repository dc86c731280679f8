"""Tokens a second of answers, sampled, from a model that is loaded already.

    python benchmarks/generate.py                 mini
    python benchmarks/generate.py --model FOLDER  another base

Prints a line for each answer; the first one of a process is slower.
"""

import argparse
import time

from interviewmate_mlx import backend
from interviewmate_mlx.coach.generate import load_coach, stream_answer
from interviewmate_mlx.coach.sampling import Sampling


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini", help="mini, or the folder of a base")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer, at most")
    parser.add_argument("--answers", type=int, default=5)
    options = parser.parse_args()
    print(backend.machine().device_name)
    model, tokenizer = load_coach(options.model, adapter=None)
    for seed in range(options.answers):
        sampling = Sampling(max_tokens=options.tokens, temperature=0.8, seed=seed)
        start = time.perf_counter()
        count = sum(1 for _ in stream_answer(model, tokenizer, "What is overfitting?", sampling))
        print(f"{count} tokens, {count / (time.perf_counter() - start):.0f} tokens/s")


if __name__ == "__main__":
    main()
