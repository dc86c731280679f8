"""Does a model repeat itself? The share of word pairs that came before in the same answer.

    python scripts/fluency.py --model mini
    python scripts/fluency.py --adapter adapters/mini --samples 2

Of the first 80 words of the answers to the 46 test questions, drawn at temperature 0.7 and top-p
0.9. The written answers' own share is printed beside it, then one line of JSON.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from interviewmate_mlx.coach.generate import load_coach, prompt_for
from interviewmate_mlx.coach.sampling import Sampling, make_sampler
from interviewmate_mlx.config import shipped
from interviewmate_mlx.data.records import load_splits

# isort: split
from mlx_lm import batch_generate

WORDS = 80
MAX_TOKENS = 130  # some 80 words of mini's tokens


def repeated_bigrams(text: str) -> float:
    """The share of the first 80 words' pairs of neighbours that came before among them."""
    words = text.lower().split()[:WORDS]
    pairs = list(itertools.pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def mean_share(texts: Iterable[str]) -> float:
    return statistics.mean(map(repeated_bigrams, texts))


def test_rows() -> Iterator[tuple[str, str]]:
    """Questions that no run has seen, and their written answers."""
    for record in load_splits(shipped("data/interview"))["test"]:
        yield record.messages[0].content, record.messages[1].content


def answers(model: Any, tokenizer: Any, samples: int = 1) -> list[str]:
    """An answer to each test question, or several. A sample's are drawn together, with its seed."""
    prompts = [prompt_for(model, tokenizer, question) for question, _ in test_rows()]
    texts = []
    for seed in range(samples):
        sampler = make_sampler(Sampling(temperature=0.7, top_p=0.9, seed=seed))
        drawn = batch_generate(model, tokenizer, prompts, max_tokens=MAX_TOKENS, sampler=sampler)
        texts += [text.strip() for text in drawn.texts]
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the base; by default the adapter's")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--samples", type=int, default=1, help="answers to each question")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N of the answers")
    args = parser.parse_args()
    texts = answers(*load_coach(args.model, args.adapter), args.samples)
    for (question, _), text in list(zip(test_rows(), texts, strict=False))[: args.show]:
        print(f"{question}\n    {text}\n")
    shares = {
        "answers": mean_share(texts),
        "written": mean_share(written for _, written in test_rows()),
    }
    for name, share in shares.items():
        print(f"repeated word pairs, {name}: {share:.1%}")
    print(json.dumps({**vars(args), "adapter": args.adapter and str(args.adapter), **shares}))


if __name__ == "__main__":
    main()
