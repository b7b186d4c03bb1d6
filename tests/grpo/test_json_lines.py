"""JSON lines: any text survives, all readers split a file at the same places, errors name lines."""

import json

import pytest

from grpo import json_lines
from grpo.types import UserError

ROWS = [
    {
        "completion": "a\u2028b\u2029c\x85d\r\n\x0b\x0c\x1c"
    },  # str.splitlines splits at each of these
    {"completion": "a lone surrogate \ud800 and a pair \U0001f600"},
    {"completion": "é 中"},
]


def test_any_text_is_read_unchanged_by_every_kind_of_reader(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json_lines.to_lines(ROWS), encoding="utf-8")
    assert json_lines.read_objects(file) == ROWS
    text = file.read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == ROWS
    assert "é 中" in text  # readable without decoding


def test_a_file_with_unescaped_separators_is_read_at_its_line_ends_only(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": "x\u2028y\x85z"}\r\n\n{"b": 1}', encoding="utf-8")
    assert list(json_lines.read(file)) == [(1, {"a": "x\u2028y\x85z"}), (3, {"b": 1})]


def test_only_an_incomplete_last_line_is_skipped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}')
    rows = json_lines.read_objects(file, skip_incomplete=True)
    assert rows == [{"step": 1}, {"step": 2}]
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2: not JSON"):
        json_lines.read_objects(file, skip_incomplete=True)


@pytest.mark.parametrize("content", [b"{broken\n", b"\xff\xfe\xff\n", b"[" * 100_000])
def test_a_line_that_is_not_json_is_an_error_that_names_the_line(tmp_path, content):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"{}\n" + content)
    with pytest.raises(UserError, match=r"a\.jsonl: line 2: not JSON"):
        json_lines.read_objects(file)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.jsonl: cannot be read: No such file"):
        json_lines.read_objects(tmp_path / "nothing.jsonl")
