"""Rows that cannot be trained on: every fault is a DataError with file, line, got, expected."""

import json

import pytest
from refusals import Bad, check

ROW = {"question": "Q?", "answer": "A."}
LINE = json.dumps(ROW).encode()
DEEP = b'{"question": ' + b"[" * 900 + b"]" * 900 + b', "answer": "A"}'


def rows(name: str, content: bytes | list, *says: str, file: str = "rows.jsonl") -> Bad:
    """The second of three lines is `content`, where that is a list of one row or a line."""
    if isinstance(content, list):
        content = b"\n".join([LINE, json.dumps(content[0]).encode(), LINE])
    return Bad(
        name,
        lambda folder: (folder / file).write_bytes(content),
        f"train --set data.path=IN/{file} --model BASE",
        "DataError",
        (f"IN/{file}", *says),
    )


def line(name: str, content: bytes, *says: str) -> Bad:
    return rows(name, b"\n".join([LINE, content, LINE]), "line 2: ", *says)


def pair(name: str, *says: str, **changes: object) -> Bad:
    return rows(name, [ROW | changes], "line 2: ", *says)


def folder(name: str, files: dict[str, bytes], *says: str, words: str = "data check IN") -> Bad:
    def make(path):
        for file, content in files.items():
            (path / file).write_bytes(content)

    return Bad(name, make, words, "DataError", says)


def with_id(value: object) -> bytes:
    return json.dumps(ROW | {"id": value}).encode()


DATA = [
    # encodings
    rows("UTF-16", ("\n".join([LINE.decode()] * 3)).encode("utf-16"), "UTF-16", "expected UTF-8"),
    rows("UTF-16 without a mark", LINE.decode().encode("utf-16-le"), "UTF-16", "expected UTF-8"),
    rows("UTF-32", LINE.decode().encode("utf-32"), "UTF-16 or UTF-32", "expected UTF-8"),
    rows(
        "Latin-1",
        '{"question": "é", "answer": "ü"}'.encode("latin-1"),
        "got 1 of 1 lines that are not UTF-8, expected UTF-8",
    ),
    line("one line in Latin-1", '{"question": "é"}'.encode("latin-1"), "not UTF-8 at byte 14"),
    line("surrogate in UTF-8", b'{"question": "\xed\xa0\x80"}', "not UTF-8 at byte 14"),
    line("overlong UTF-8", b'{"question": "\xc0\xaf"}', "not UTF-8 at byte 14"),
    pair("lone surrogate", "answer: got half a surrogate pair", answer="\ud800"),
    line("lone surrogate in a key", b'{"\\ud800": 1}', "got the keys '\\ud800', expected"),
    line("zeros", bytes(20), "not JSON: ", "column 1"),
    # JSON
    line("half an object", b'{"question": "Q?"', "not JSON: Expecting ',' delimiter at column 18"),
    line("single quotes", b"{'question': 'Q'}", "not JSON: ", "column 2"),
    line("trailing comma", b'{"question": "Q",}', "not JSON: ", "column 1"),
    line("two rows on a line", LINE + LINE, "not JSON: Extra data at column"),
    line(
        "a line break in a text",
        b'{"question": "Q\n"}',
        "not JSON: ",
        "Unterminated string starting at at column 14",
    ),
    line("CSV", b"question,answer", "not JSON: Expecting value at column 1"),
    line("a list", b"[1]", "got [1], expected a JSON object"),
    line("a number", b"1", "got 1, expected a JSON object"),
    line("NaN", b"NaN", "got nan, expected a JSON object"),
    line("deep nesting", b"[" * 100_000, "nested too deeply"),
    line("deep nesting in a text's place", DEEP, "question: got [[[", "expected a string"),
    line("number of 5000 digits", b'{"id": ' + b"9" * 5000 + b"}", "4300 digits"),
    line("a key twice", b'{"question": "a", "question": "b"}', "'question' more than once"),
    line(
        "a line of 10 MB",
        json.dumps(ROW | {"answer": "a" * (10 << 20)}).encode(),
        "got 10485792 bytes, expected at most 1048576 in a row",
    ),
    line("many keys", json.dumps(dict.fromkeys(map(str, range(9000)))).encode(), "and 8990 more"),
    # rows
    rows("no keys", [{}], "line 2: ", "got the keys (none), expected 'question' and 'answer'"),
    rows("misspelt key", [{"questoin": "Q", "answer": "A"}], "got the keys 'questoin', 'answer'"),
    pair("misspelt label", "got the key 'catgory', expected 'category'", catgory="c"),
    pair("empty answer", "answer: got an empty string", answer=" \n"),
    pair("null answer", "answer: got nothing, expected a string", answer=None),
    pair("number for an answer", "answer: got 42, expected a string", answer=42),
    pair("list for a question", "question: got ['Q'], expected a string", question=["Q"]),
    pair("bool for an id", "id: got True, expected a string", id=True),
    pair("float for an id", "id: got 1.5, expected a string", id=1.5),
    pair("NaN for an id", "id: got nan, expected a string", id=float("nan")),
    pair("object for an id", "id: got {}, expected a string", id={}),
    pair("control characters in an id", "id: got '\\x1b[2J', expected no", id="\x1b[2J"),
    pair("line break in a category", "category: got 'a\\nb', expected no", category="a\nb"),
    rows("no messages", [{"messages": []}], "line 2: ", "roles (none), expected user"),
    rows("text for messages", [{"messages": "hi"}], "line 2: ", "expected a list of objects"),
    rows("messages of texts", [{"messages": ["hi"]}], "line 2: ", "expected a list of objects"),
    rows(
        "unknown role",
        [{"messages": [{"role": "tool", "content": "c"}]}],
        "line 2: messages: got the role 'tool', expected system, user, assistant",
    ),
    rows(
        "answer first",
        [{"messages": [{"role": "assistant", "content": "c"}, {"role": "user", "content": "c"}]}],
        "line 2: messages: got the roles assistant, user, expected user and assistant in turn",
    ),
    rows("list for a role", [{"messages": [{"role": [], "content": "c"}]}], "role: got []"),
    rows("prompt alone", [{"prompt": "P"}], "line 2: ", "got the keys 'prompt', expected"),
    rows("null completion", [{"prompt": "P", "completion": None}], "completion: got nothing"),
    # files
    rows("empty file", b"", "no rows", "Add rows, one JSON object per line"),
    rows("only blank lines", b"\r\n \n\n", "no rows"),
    rows("only a mark", b"\xef\xbb\xbf", "no rows"),
    rows("another ending", LINE, "got a .txt file, expected .jsonl or .json", file="rows.txt"),
    rows("no ending", LINE, "got a nameless file, expected .jsonl or .json", file="rows"),
    rows(
        "object in .json",
        LINE,
        "got a JSON object with the keys 'question', 'answer', expected a list of rows",
        file="rows.json",
    ),
    rows("broken .json", b"[" + LINE, "not JSON: ", "char", file="rows.json"),
    rows("deep .json", b"[" * 99_999, "rows.json: nested too deeply", file="rows.json"),
    rows("empty .json", b"[]", "no rows", file="rows.json"),
    rows("17 MB of .json", b"[" + b"[]," * (6 << 20), "it is larger than 16 MB", file="rows.json"),
    rows("a row of .json", b'[{"question": 1}]', "row 1: got the keys", file="rows.json"),
    rows(
        "duplicate ids",
        b"\n".join([with_id("x"), with_id("y"), with_id("x")]),
        "line 3: id 'x' is taken by line 1; expected each id once",
    ),
    rows("ids 1 and '1'", with_id(1) + b"\n" + with_id("1"), "line 2: id '1' is taken by line 1"),
    rows("faults without end", b"{\n" * 3000, "3000 rows (lines 1, 2, 3, ...)"),
    Bad(
        "no such file",
        lambda _: None,
        "train --set data.path=mine.jsonl --model BASE",
        "DataError",
        ("No data at mine.jsonl", "The current folder is", "Give a .jsonl or .json file"),
    ),
    Bad(
        "a folder that ends in .jsonl",
        lambda path: (path / "rows.jsonl").mkdir(),
        "data check IN/rows.jsonl",
        "DataError",
        ("IN/rows.jsonl holds no train.jsonl and no train.json",),
    ),
    Bad(
        "only rows that are too long",
        lambda path: (path / "rows.jsonl").write_bytes(
            json.dumps({"question": "word " * 400, "answer": "A"}).encode()
        ),
        "train --set data.path=IN/rows.jsonl --set data.max_length=64 --model BASE",
        "DataError",
        ("IN/rows.jsonl: of 1 rows none has a token left", "64 tokens", "Raise data.max_length"),
    ),
    # folders
    folder("empty folder", {}, "/in holds no train.jsonl and no train.json", "Add one"),
    folder("no training rows", {"test.jsonl": LINE}, "holds no train.jsonl"),
    folder("train is faulty, test too", {"train.jsonl": b"{", "test.jsonl": b"["}, "train", "test"),
    folder(
        "ids that splits share",
        {"train.jsonl": with_id("x"), "valid.jsonl": with_id("x")},
        "valid.jsonl line 1: id 'x' is taken by train.jsonl line 1",
    ),
    folder(
        "split of one row twice, without ids",
        {"a.jsonl": LINE + b"\n" + LINE},
        "a.jsonl line 2: the same question and answer as a.jsonl line 1, and no id",
        words="data split IN/a.jsonl --out out",
    ),
    folder(
        "split of two sources with one id",
        {"a.jsonl": with_id("x"), "b.jsonl": with_id("x")},
        "IN/b.jsonl: id 'x' is in another source too",
        words="data split IN/a.jsonl IN/b.jsonl --out out",
    ),
    folder(
        "split of shares that are none",
        {"a.jsonl": with_id("x")},
        "Shares: got (0.5, 0.5, 0.5), expected three from 0 to 1 that sum to 1",
        words="data split IN/a.jsonl --out out --shares .5 .5 .5",
    ),
    folder(
        "split of nothing", {}, "Nothing to split: out holds no rows", words="data split --out out"
    ),
]


@pytest.mark.parametrize("bad", DATA, ids=str)
def test_bad_data_is_refused(bad, tmp_path, tiny_base):
    check(bad, tmp_path, {"BASE": tiny_base})


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "open"])
def test_good_file_of_any_editor_is_accepted(imate, tmp_path, end, mark, last):
    lines = [json.dumps({"question": f"Q{i}?", "answer": f"A{i} é 漢 \\ud83d."}) for i in range(3)]
    text = end.join(line.replace("\\\\ud83d", "").encode() for line in lines)
    (tmp_path / "rows.jsonl").write_bytes(mark + text + end * last)
    assert json.loads(imate("data", "check", "rows.jsonl", "--json").stdout)["rows"] == {"train": 3}
    (tmp_path / "rows.json").write_bytes(mark + b"[" + text.replace(end, b"," + end) + b"]")
    assert json.loads(imate("data", "check", "rows.json", "--json").stdout)["rows"] == {"train": 3}
