"""How well shared terms tell an answer to a question from one to another question.

For each row of `interview-preferences`, the points of the written answer in `interview-1000`
that are covered by: the better answer to the same question, the worse one, and the better answer
to the next question of the same category.

Run: python scripts/data/points.py
"""

import json
from collections import defaultdict
from pathlib import Path

from interviewmate_mlx.coach.points import points_of, term_weights

DATA = Path(__file__).parents[2] / "data"
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)


def read(folder: str) -> list[dict[str, str]]:
    """All rows of a data set."""
    paths = sorted((DATA / folder).glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def main() -> None:
    rows = {row["question"]: row for row in read("interview-1000")}
    weights = term_weights(f"{row['question']} {row['answer']}" for row in rows.values())
    pairs = [pair for pair in read("interview-preferences") if pair["prompt"] in rows]
    by_category = defaultdict(list)
    for pair in pairs:
        by_category[pair["category"]].append(pair)
    shares = defaultdict(list)
    for group in by_category.values():
        for pair, other in zip(group, group[1:] + group[:1], strict=True):
            reference = rows[pair["prompt"]]["answer"]
            answers = {
                "the better answer": pair["chosen"],
                "the worse answer": pair["rejected"],
                "an answer to another question": other["chosen"],
            }
            for kind, text in answers.items():
                shares[kind] += [point.share for point in points_of(reference, text, weights)]
    print(f"{len(pairs)} questions, {len(shares['the better answer'])} points")
    print("points covered, by threshold".ljust(32), *(f"{t:6.1f}" for t in THRESHOLDS))
    for kind, found in shares.items():
        covered = [sum(s >= t for s in found) / len(found) for t in THRESHOLDS]
        print(kind.ljust(32), *(f"{share:6.1%}" for share in covered))


if __name__ == "__main__":
    main()
