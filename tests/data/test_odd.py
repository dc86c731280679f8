"""Personal data and secrets in rows: found, and never shown whole."""

import json

import pytest

from interviewmate_mlx.config import shipped_data
from interviewmate_mlx.data.check import inspect_data
from interviewmate_mlx.data.odd import find_personal

FOUND = {
    "write to jane.doe+news@mail.firm.co.uk, please": "an e-mail address",
    "JANE@FIRM.DE": "an e-mail address",
    "call +49 30 901820 today": "a telephone number",
    "call +1 (555) 010-4477": "a telephone number",
    "call (555) 010-4477.": "a telephone number",
    "555-010-4477": "a telephone number",
    "token hf_" + "abcDEF123" * 4: "a key or token",
    "sk-proj-" + "aB3_" * 8: "a key or token",
    "sk-ant-api03-" + "aB3_" * 8: "a key or token",
    "ghp_" + "a1B2" * 9: "a key or token",
    "AKIAIOSFODNN7EXAMPLE": "a key or token",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE": "a private key",
    "-----BEGIN PRIVATE KEY-----": "a private key",
    "ping 93.184.216.34 first": "an address on the internet",
    "pay with 4111 1111 1111 1111": "the number of a payment card",
    "5500-0000-0000-0004": "the number of a payment card",
    "to DE89 3704 0044 0532 0130 00": "the number of a bank account",
    "GB82WEST12345698765432": "the number of a bank account",
}
CLEAN = [
    "name@example.com, name@firm.example, a@b.com, @mx.compile, user@host",
    "recall@5 and precision@10.5",
    "version 1.2.3.4.5, 127.0.0.1, 192.168.0.1, 10.1.2.3, 300.1.1.1",
    "1234 5678 9012 3456",  # the check digit is wrong
    "DE00 3704 0044 0532 0130 00",  # the check digits are wrong
    "2026-11-26 12:30:45, 1,311,625,216 parameters, 3.14159265",
    "sk-learn, skip-gram, hf_hub, key: sk-...",
    "x = 123-456; 0.123-0.456-0.7890",
    "0x7ffdeadbeef, e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
]


@pytest.mark.parametrize(("text", "kind"), FOUND.items())
def test_what_has_a_form_is_found_and_not_shown(text, kind):
    ((found, start),) = find_personal(f"Please {text}")
    assert found == kind
    assert len(start.removesuffix("...")) <= 4


@pytest.mark.parametrize("text", CLEAN)
def test_what_only_looks_like_it_is_not(text):
    assert list(find_personal(text)) == []


def test_long_texts_that_match_nearly_are_searched_in_time():
    for text in (
        "a" * 10**6,
        "eyJ" * 10**5,
        "1 " * 10**5,
        "a." * 10**5,
        "+1 2" * 10**5,
        "-" * 10**6,
    ):
        list(find_personal(text + "@"))  # a pattern that backtracks would take hours


def test_check_warns_of_rows_and_trains_on_them_all_the_same(tmp_path):
    path = tmp_path / "rows.jsonl"
    said = "Ask jane.doe@firm.de."
    rows = [{"question": "Who knows?", "answer": said}, {"question": "Why?", "answer": "So."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = inspect_data(path)
    assert found.report is not None
    (warning,) = found.warnings
    assert warning.place == "rows.jsonl line 1"
    assert "what looks like an e-mail address (jane...)" in warning.message
    assert "doe" not in warning.message


@pytest.mark.parametrize("name", ["interview", "interview-1000", "interview-dialogues"])
def test_shipped_rows_have_none(name):
    folder = shipped_data(name)
    assert folder
    found = inspect_data(folder)
    assert [warning for warning in found.warnings if "remember" in warning.message] == []
