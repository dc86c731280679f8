"""Tables, Parquet and packed files that lie, grow, or end too early."""

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from peaks import forget_peak, peak_bytes
from pyarrow import parquet

from interviewmate_mlx.data import check
from interviewmate_mlx.data.records import scan_records
from interviewmate_mlx.formats import parquet_file

ROW = {"question": "Q?", "answer": "A."}
LINE = json.dumps(ROW).encode() + b"\n"


def as_parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file, **options)
    return file.getvalue()


GOOD = as_parquet([ROW] * 100)


def with_footer(change: Callable[[bytes], bytes]) -> bytes:
    """A Parquet file with another footer, whose length is right."""
    size = struct.unpack("<I", GOOD[-8:-4])[0]
    footer = change(GOOD[-8 - size : -8])
    return GOOD[: -8 - size] + footer + struct.pack("<I", len(footer)) + b"PAR1"


def bomb(size: int) -> bytes:
    """Little packed data that stands for much."""
    return gzip.compress(b"question,answer\n" + b"\0" * size, 9)


FILES: dict[str, tuple[str, bytes, str]] = {
    # tables
    "a quote that does not close": (
        "a.csv",
        b'question,answer\nQ?,"A.\n' + b"Q?,A.\n" * 9,
        "a quote that opens in row 2 does not close",
    ),
    "a quote that does not close in a large file": (
        "a.csv",
        b'question,answer\nQ?,"A.\n' + b"Q?,A.\n" * 900_000,
        "row 2 holds a cell of more than 1 MB, or a quote that does not close",
    ),
    "a billion columns, nearly": ("a.csv", b"a," * (1 << 24), "columns, at most 1000 are read"),
    "many columns": ("a.csv", b",".join(b"c%d" % n for n in range(5000)), "it has 5000 columns"),
    "one endless line": ("a.csv", b"question" * (1 << 18), "row 1 holds a cell of more"),
    "no names": ("a.csv", b"\n\n", "no rows"),
    "only nulls": ("a.csv", b"question,answer\n" + b"\0,\0\n" * 9, "a zero byte, at byte 0"),
    "empty cells": ("a.csv", b"question,answer\n" + b",\n" * 9, "no rows"),
    "a name twice": ("a.csv", b"answer,answer\nA,B\n", "two columns are named 'answer'"),
    "mixed encodings": (
        "a.csv",
        "question,answer\né,A\n".encode() + "é,A\n".encode("latin-1") + b"Q,A\n",
        "row 3: not UTF-8 at byte 0",
    ),
    "mostly Latin-1": (
        "a.csv",
        b"question,answer\n" + "é,ü\n".encode("latin-1") * 9,
        "encoding: got 9 of 10 lines that are not UTF-8",
    ),
    "UTF-16 of a spreadsheet": ("a.csv", "question\tanswer\n".encode("utf-16"), "UTF-16"),
    "a spreadsheet itself": ("a.csv", b"PK\x03\x04" + bytes(99), "got a zip or Excel file"),
    "control characters": ("a.csv", b"question,answer,id\nQ,A,\x1b[2J\n", "expected no line"),
    # Parquet
    "half a Parquet file": ("a.parquet", GOOD[: len(GOOD) // 2], "damaged Parquet"),
    "a Parquet file of its first bytes": ("a.parquet", b"PAR1", "damaged Parquet"),
    "a footer of zeros": ("a.parquet", with_footer(lambda f: bytes(len(f))), "damaged Parquet"),
    "a footer that names more bytes than there are": (
        "a.parquet",
        GOOD[:-8] + b"\xff\xff\xff\x7fPAR1",
        "damaged Parquet",
    ),
    "pages of noise": (
        "a.parquet",
        GOOD[:4] + bytes(range(200)) + GOOD[204:],
        "",
    ),
    "a page that unpacks to 200 MB": (
        "a.parquet",
        as_parquet([{"question": "Q" * (200 << 20), "answer": "A"}], compression="zstd"),
        "characters, expected at most 1048576 in a row",
    ),
    "many Parquet columns": (
        "a.parquet",
        as_parquet([{f"c{n}": 1 for n in range(1500)}]),
        "it has 1500 columns, at most 1000 are read",
    ),
    "deep Parquet": (
        "a.parquet",
        as_parquet([{"question": json.loads("[" * 60 + "1" + "]" * 60), "answer": "A"}]),
        "damaged Parquet: Parquet schema too deeply nested",
    ),
    "nothing but nulls": (
        "a.parquet",
        as_parquet([{"question": None, "answer": None}] * 9),
        "question: got nothing, expected a string",
    ),
    "no rows in Parquet": ("a.parquet", as_parquet([ROW][:0]), "no rows"),
    # packed
    "a gzip bomb of lines": ("a.jsonl.gz", bomb(1 << 30), "unpacked, it is larger than 256 MB"),
    "a gzip bomb of a table": ("a.csv.gz", bomb(1 << 30), "unpacked, it is larger than 256 MB"),
    "a gzip bomb of a list": (
        "a.json.gz",
        gzip.compress(b"[" + b" " * (1 << 28), 9),
        "it is larger than 16 MB",
    ),
    "a gzip bomb of Parquet": (
        "a.parquet.gz",
        gzip.compress(b"PAR1" + bytes(1 << 29), 9),
        "unpacked, it is larger than 256 MB",
    ),
    "gzip in gzip": ("a.jsonl.gz", gzip.compress(gzip.compress(LINE)), ""),
    "half a gzip": ("a.jsonl.gz", gzip.compress(LINE * 9999)[:-20], "damaged gzip"),
    "gzip with noise behind it": ("a.jsonl.gz", gzip.compress(LINE) + b"noise", "damaged gzip"),
    "wrapped twice": ("a.json", json.dumps({"train": [ROW], "test": [ROW]}).encode(), "several"),
    "train and data": ("a.json", json.dumps({"train": [ROW], "data": [ROW]}).encode(), "several"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "says"), FILES.values(), ids=FILES)
def test_file_gives_one_message_in_bounded_time_and_memory(imate, name, content, says):
    Path(name).write_bytes(content)
    forget_peak()
    before, start = peak_bytes(), time.monotonic()
    refusal = imate("data", "check", name, code=1).stderr
    assert time.monotonic() - start < 60
    assert peak_bytes() - before < 700 << 20
    assert refusal.startswith("DataError: ")
    assert says in refusal
    assert len(refusal) < 5000


def test_formulas_in_cells_are_text(imate):
    cells = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(1)", '=HYPERLINK("http://x")']
    text = "question,answer\n" + "".join(
        f'What is {n}?,"{cell.replace(chr(34), chr(34) * 2)}"\n' for n, cell in enumerate(cells)
    )
    Path("a.csv").write_text(text)
    records, faults = scan_records(Path("a.csv"))
    assert faults == []
    assert [record.answer for record in records] == cells


def test_reader_of_parquet_that_dies_is_a_message(tmp_path, monkeypatch):
    """As a fault of Arrow's own would kill it."""
    (tmp_path / "a.parquet").write_bytes(GOOD)
    real = subprocess.Popen

    def dying(words: list[str], **options: Any) -> Any:
        return real([sys.executable, "-c", "import os; os.abort()"], **options)

    monkeypatch.setattr(parquet_file.subprocess, "Popen", dying)
    _, (fault,) = scan_records(tmp_path / "a.parquet")
    assert "the reader of Parquet died" in fault.message


def test_parquet_runs_nothing_of_the_folder_it_stands_in(tmp_path, monkeypatch):
    for name in ("pyarrow.py", "json.py", "sitecustomize.py", "resource.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "a.parquet").write_bytes(GOOD)
    monkeypatch.chdir(tmp_path)
    records, faults = scan_records(Path("a.parquet"))
    assert (len(records), faults) == (100, [])
    assert not (tmp_path / "ran").exists()


def test_parquet_is_read_where_another_package_has_this_ones_name(tmp_path, monkeypatch):
    """The reading process needs nothing of this package, which may only be in a folder."""
    other = tmp_path / "interviewmate_mlx"
    other.mkdir()
    (other / "__init__.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(GOOD)
    records, faults = scan_records(tmp_path / "a.parquet")
    assert (len(records), faults) == (100, [])


def test_without_pyarrow_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(GOOD)
    monkeypatch.setattr(parquet_file, "find_spec", lambda name: None)
    _, (fault,) = scan_records(tmp_path / "a.parquet")
    assert fault.message == "Parquet needs pyarrow, which is not installed"
    assert 'pip install "interviewmate-mlx[parquet]"' in fault.advice


READ = """
import sys
from pathlib import Path
from peaks import peak_bytes
from interviewmate_mlx.data.records import iterate_records
before = peak_bytes()
print(sum(1 for _ in iterate_records(Path(sys.argv[1]))), peak_bytes() - before)
"""


def run_in_new_process(code: str, path: Path) -> list[int]:
    """The numbers that a program prints of a file."""
    folders = [Path(check.__file__).parents[2], Path(__file__).parents[1]]
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(number) for number in done.stdout.split()]


def test_large_file_is_read_in_constant_memory(tmp_path):
    """100 MB of lines, in a process whose memory grows by a tenth of that at most."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        for number in range(100):
            row = json.dumps({"question": f"Q{number}", "answer": "word " * 200}).encode() + b"\n"
            file.write(row * 1000)
    count, grown = run_in_new_process(READ, path)
    assert count == 100_000
    assert grown < 10_000_000


CHECK = """
import sys
from pathlib import Path
from peaks import peak_bytes
from interviewmate_mlx.data import check, leakage
# Or files of the real size would be needed.
check.MAX_COMPARED_ROWS, check.MAX_FAULTS, leakage._CACHE_KB = 500, 500, 64
found = check.inspect_data(Path(sys.argv[1]))
print(peak_bytes(), len(found.faults), len(found.warnings))
"""


@pytest.mark.parametrize("kind", ["good", "faulty"])
def test_check_of_four_times_the_rows_takes_no_more_memory(tmp_path, kind):
    """Ids, hashes of texts, lengths and faults of all rows: none may stay in memory."""
    peaks = []
    for number in (8_000, 32_000):
        path = tmp_path / f"{number}.jsonl"
        with path.open("w") as file:
            for n in range(number):
                row = {"question": f"What is {n} of {n * 7919}?", "answer": f"{n}, {n * 31}, more"}
                row |= {"id": f"a-rather-long-id-of-a-row-{n:09}"} if kind == "good" else {}
                row |= {"category": f"{n}", "answer": f"a{n}@b{n}.com"} if kind == "faulty" else {}
                row |= {"difficulty": "odd"} if kind == "faulty" and n % 2 else {}
                file.write(json.dumps(row) + "\n")
        peak, num_faults, num_warnings = run_in_new_process(CHECK, path)
        assert (num_faults > 500) == (num_warnings > 500) == (kind == "faulty")
        peaks.append(peak)
    # 24,000 rows more: places, ids and hashes of each took 28 MB, or 42 with faults.
    assert peaks[1] - peaks[0] < 12e6
