"""Your own questions, end to end: write rows, split them, check them, train, ask.

    python examples/own_data.py                 # in a temporary folder, which is removed
    python examples/own_data.py --out my_coach  # in a new folder, which stays

It trains on `mini`, the small base that comes along, so it needs no network. On a Linux CPU
the first run on a machine takes longer than later ones, because MLX compiles its kernels then.
`mini` is too small to know anything: see how each step works, not what it says.
"""

import argparse
import json
import tempfile
from pathlib import Path

from interviewmate_mlx.coach.generate import answer, load_coach
from interviewmate_mlx.coach.sampling import Sampling
from interviewmate_mlx.config import load_run
from interviewmate_mlx.data.check import check_data
from interviewmate_mlx.data.splits import split_rows
from interviewmate_mlx.training.events import Finished, Stepped, Validated
from interviewmate_mlx.training.loop import train

# A question, and what a strong candidate says. Real data needs hundreds of rows.
QUESTIONS = {
    "What is an index?": "A sorted copy of some columns that points back to the rows. Reads get "
    "faster, and every write pays for it.",
    "When does a deadlock happen?": "When two transactions hold a lock each and wait for the "
    "other's. The database ends one of them; try that one again.",
    "What does EXPLAIN show?": "The plan of a query: which indexes it uses, and how many rows each "
    "step expects.",
    "What is a foreign key?": "A column whose values must exist in another table. It keeps rows "
    "from pointing to nothing.",
    "Why do we normalise tables?": "So that each fact stands in one place, and an update cannot "
    "change one copy and forget the other.",
    "What is a view?": "A stored query that reads like a table. It hides joins from those who only "
    "want the result.",
    "What is a TCP handshake?": "SYN, SYN-ACK, ACK. Both sides then know each other's first "
    "sequence number.",
    "Why is UDP used for calls?": "A late packet is worth nothing in a call, so nobody should wait "
    "for it.",
    "What does a load balancer check?": "Whether each server answers its health check. One that "
    "does not gets no new requests.",
    "How long should a DNS record live?": "Long enough to spare lookups, short enough for the next "
    "move of the server.",
    "What is TLS for?": "It hides what is sent, shows any change to it, and proves who the server "
    "is.",
    "What is a reverse proxy?": "A server in front of others. It takes their requests, and can "
    "cache, encrypt and limit them.",
}


def main(folder: Path) -> None:
    # 1. Rows: one JSON object a line. The id never changes, so a row stays in its split for good.
    rows = folder / "rows.jsonl"
    lines = [
        json.dumps({"id": f"q{number:02}", "question": question, "answer": text})
        for number, (question, text) in enumerate(QUESTIONS.items(), start=1)
    ]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")

    # 2. Splits: train to learn from, valid to choose the best adapter, test for you to ask.
    data = folder / "questions"
    report = split_rows([rows], data)
    print("rows:", ", ".join(f"{count} {split}" for split, count in report.rows.items()))

    # 3. Check: faulty rows and near-duplicates raise a DataError that names all of them.
    words = check_data(data).answer_words
    print(f"no faults; an answer has {words[0]} to {words[2]} words")

    # 4. Train: the shipped run for mini, on these rows. Few rows need more epochs and larger steps.
    settings = {"epochs": 6, "warmup_ratio": 0.1, "learning_rate": 5e-3}
    run = load_run("mini").replace("own_data", data={"path": str(data)}, train=settings)
    adapter = folder / "adapter"
    for event in train(run, adapter):
        if isinstance(event, Stepped):
            print(f"step {event.step:2}  loss {event.loss:.3f}")
        elif isinstance(event, Validated):
            print(f"         validation loss {event.loss:.3f}{'  best' * event.is_best}")
        elif isinstance(event, Finished):
            print(f"kept the adapter of step {event.best_step}, in {adapter}")

    # 5. Ask. The adapter names its base, so it is enough.
    model, tokenizer = load_coach(adapter=adapter)
    sampling = Sampling(max_tokens=40, temperature=0.6, top_p=0.9, seed=1)
    question = "What is a transaction?"
    print(f"\n{question}\n{answer(model, tokenizer, question, sampling)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a new folder to write to")
    out = parser.parse_args().out
    if out:
        out.mkdir(parents=True)
        main(out)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
