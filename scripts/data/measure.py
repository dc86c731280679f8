"""Measure how varied the texts of the shipped sets are, and what length tells in the pairs.

    .venv/bin/python scripts/data/measure.py

Prints a table a set, with a column for each split and one for all rows, and for
interview-1000 one more for the rows that interview does not have. Plain Python.
"""

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

DATA = Path(__file__).parents[2] / "data"
ROW_SETS = ("interview", "interview-1000")
MANY_NUMBERS = 3  # an answer with more than these is dense
SHOWN_WORDS = 4  # of the commonest first words
HEDGES = r"\b(but|however|though|unless|although|depends)\b"
CONTRACTION = (
    r"\b(\w+(n't|'re|'ve|'ll|'d|'m)|"
    r"(it|that|there|here|what|who|where|how|he|she|let|one|nobody|everybody)'s)\b"
)

Row = dict[str, str]
Measures = dict[str, str]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> int:
    return len(text.split())


def numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d,]*(?:\.\d+)?", text)


def sentences(text: str) -> list[str]:
    """Of the prose: code between fences and indented lines are left out."""
    prose = re.sub(r"```.*?```|^    .*$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    parts = re.split(r"(?<=[.!?])\s+|\n+", prose)
    return [part for part in parts if re.search(r"\w", part)]


def first_word(text: str) -> str:
    found = re.search(r"[\w']+", text)
    return found[0].lower() if found else ""


def share(flags: Iterable[bool]) -> str:
    values = list(flags)
    return f"{100 * sum(values) / len(values):.0f} %"


def first_words(texts: list[str]) -> str:
    counts = Counter(map(first_word, texts)).most_common(SHOWN_WORDS)
    return ", ".join(f"{word} {100 * count / len(texts):.0f}" for word, count in counts)


def quartiles(values: list[int]) -> str:
    cuts = statistics.quantiles(values, n=4, method="inclusive")
    return " / ".join(f"{value:.0f}" for value in cuts)


def extremes(values: list[int]) -> str:
    return f"{min(values)} to {max(values)}"


def measure_rows(rows: list[Row]) -> Measures:
    answers = [row["answer"] for row in rows]
    lengths = [words(sentence) for answer in answers for sentence in sentences(answer)]
    num_digits = sum(len(re.findall(r"\d", answer)) for answer in answers)
    follow_ups = [row["follow_up"] for row in rows]
    return {
        "rows": f"{len(rows)}",
        "digits per 100 words": f"{100 * num_digits / sum(map(words, answers)):.1f}",
        "answers with more than 3 numbers": share(len(numbers(a)) > MANY_NUMBERS for a in answers),
        "answers with contractions": share(bool(re.search(CONTRACTION, a, re.I)) for a in answers),
        "answers with line breaks": share("\n" in answer for answer in answers),
        "words an answer, quartiles": quartiles([words(answer) for answer in answers]),
        "words an answer, extremes": extremes([words(answer) for answer in answers]),
        "words a sentence, mean": f"{statistics.mean(lengths):.1f}",
        "words a sentence, spread": f"{statistics.stdev(lengths):.1f}",
        "last sentence with but, though, ...": share(
            bool(re.search(HEDGES, sentences(answer)[-1], re.I)) for answer in answers
        ),
        "follow-ups that begin with How": share(first_word(f) == "how" for f in follow_ups),
        "first words of answers, %": first_words(answers),
        "first words of questions, %": first_words([row["question"] for row in rows]),
        "first words of follow-ups, %": first_words(follow_ups),
    }


def measure_dialogues(rows: list[dict]) -> Measures:
    turns = [message for row in rows for message in row["messages"]]
    coach = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    candidate = [turn["content"] for turn in turns if turn["role"] == "user"]
    totals = [sum(words(message["content"]) for message in row["messages"]) for row in rows]
    lengths = [words(sentence) for turn in coach for sentence in sentences(turn)]
    num_digits = sum(len(re.findall(r"\d", turn)) for turn in coach)
    return {
        "rows": f"{len(rows)}",
        "messages a row": f"{len(turns) / len(rows):.1f}",
        "words a row, quartiles": quartiles(totals),
        "words a row, extremes": extremes(totals),
        "words a coach turn, quartiles": quartiles([words(turn) for turn in coach]),
        "words a candidate turn, quartiles": quartiles([words(turn) for turn in candidate]),
        "digits per 100 words of the coach": f"{100 * num_digits / sum(map(words, coach)):.1f}",
        "coach turns with contractions": share(
            bool(re.search(CONTRACTION, turn, re.I)) for turn in coach
        ),
        "words a coach sentence, mean": f"{statistics.mean(lengths):.1f}",
        "words a coach sentence, spread": f"{statistics.stdev(lengths):.1f}",
        "first words of coach turns, %": first_words(coach),
        "first words of last turns, %": first_words([r["messages"][-1]["content"] for r in rows]),
    }


def accuracy(pairs: list[Row], length: Callable[[str], int], threshold: int, longer: bool) -> float:
    """The share of texts put right by: chosen if the length is at least the threshold.

    Without `longer`: if it is below.
    """
    hits = [
        ((length(pair[key]) >= threshold) == longer) == (key == "chosen")
        for pair in pairs
        for key in ("chosen", "rejected")
    ]
    return sum(hits) / len(hits)


def best_threshold(pairs: list[Row], length: Callable[[str], int]) -> tuple[int, bool]:
    lengths = sorted({length(pair[key]) for pair in pairs for key in ("chosen", "rejected")})
    rules = [(threshold, longer) for threshold in lengths for longer in (True, False)]
    return max(rules, key=lambda rule: accuracy(pairs, length, *rule))


def measure_pairs(train: list[Row], valid: list[Row]) -> dict[str, Measures]:
    """What a single threshold on the length tells of the pairs, in words and in characters."""
    columns: dict[str, Measures] = {}
    pairs = train + valid
    for unit, length in (("words", words), ("characters", len)):
        rule = best_threshold(train, length)
        chosen = [length(pair["chosen"]) for pair in pairs]
        rejected = [length(pair["rejected"]) for pair in pairs]
        longer = [a > b for a, b in zip(chosen, rejected, strict=True)]
        columns[unit] = {
            "mean of chosen": f"{statistics.mean(chosen):.1f}",
            "mean of rejected": f"{statistics.mean(rejected):.1f}",
            "pairs whose chosen is longer": share(longer),
            "threshold fitted on train": f"{'>=' if rule[1] else '<'} {rule[0]}",
            "its share right on train": f"{100 * accuracy(train, length, *rule):.1f} %",
            "its share right on valid": f"{100 * accuracy(valid, length, *rule):.1f} %",
            "best threshold fitted on all": (
                f"{100 * accuracy(pairs, length, *best_threshold(pairs, length)):.1f} %"
            ),
        }
    return columns


def print_table(title: str, columns: dict[str, Measures]) -> None:
    """First what is short, a column each; then what is long, a line each."""
    names = list(next(iter(columns.values())))
    short = [name for name in names if not name.startswith("first words")]
    print(f"\n{title}")
    print(f"{'':38}" + "".join(f"{column:>16}" for column in columns))
    for name in short:
        print(f"{name:38}" + "".join(f"{column[name]:>16}" for column in columns.values()))
    for name in names[len(short) :]:
        print(name)
        for column, measures in columns.items():
            print(f"  {column:12}{measures[name]}")


def main() -> None:
    known: set[str] = set()
    for folder in ROW_SETS:
        splits = {s: read_rows(DATA / folder / f"{s}.jsonl") for s in ("train", "valid", "test")}
        splits["all"] = [row for rows in splits.values() for row in rows]
        new = [row for row in splits["all"] if row["id"] not in known]
        if known:
            splits["new"] = new
        known |= {row["id"] for row in new}
        print_table(folder, {split: measure_rows(rows) for split, rows in splits.items()})
    folder = DATA / "interview-dialogues"
    splits = {split: read_rows(folder / f"{split}.jsonl") for split in ("train", "valid", "test")}
    splits["all"] = [row for rows in splits.values() for row in rows]
    print_table(folder.name, {split: measure_dialogues(rows) for split, rows in splits.items()})
    folder = DATA / "interview-preferences"
    train, valid = (read_rows(folder / f"{split}.jsonl") for split in ("train", "valid"))
    print_table(
        f"{folder.name}: {len(train)} train, {len(valid)} valid", measure_pairs(train, valid)
    )


if __name__ == "__main__":
    main()
