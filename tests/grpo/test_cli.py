"""The command line: where words may stand, and what happens when nobody reads the output."""

import os
import subprocess
import sys

import pytest
from stage_configs import sft_config
from whole_runs import environment, write_config

from grpo import cli

OVERRIDES = ["a=1", "b={c: 2}"]
FLAGS = {
    "sft": ["--resume"],
    "train": ["--auto-resume"],
    "collect": ["--dry-run"],
    "distill": ["--resume"],
    "quantize": ["--resume"],
    "eval": ["--ask", "1+1=?"],
    "pipeline": ["--resume"],
    "doctor": ["--price", "2"],
    "bench": ["--simulate", "h100"],
    "replay": ["--step", "3"],
}


def places(flag: list[str]) -> list[list[str]]:
    """Returns the words of a command with a flag before, between and after the overrides."""
    first, second = OVERRIDES
    return [
        [*flag, "c.yaml", first, second],
        ["c.yaml", *flag, first, second],
        ["c.yaml", first, *flag, second],
        ["c.yaml", first, second, *flag],
    ]


@pytest.mark.parametrize("command", FLAGS)
def test_flags_stand_before_between_and_after_overrides(command):
    parsed = [cli._parse([command, *words]) for words in places(FLAGS[command])]
    assert all(options.overrides == OVERRIDES for options in parsed)
    assert all(vars(options) == vars(parsed[0]) for options in parsed)


def test_two_flags_stand_among_three_overrides():
    options = cli._parse(["doctor", "c.yaml", "a=1", "--price", "2", "b=2", "--no-sample", "c=3"])
    assert options.overrides == ["a=1", "b=2", "c=3"]
    assert (options.price, options.no_sample) == (2.0, True)


def test_runs_may_follow_a_flag():
    expected = ["a", "b", "c"]
    for words in ("a b c --output f", "a --output f b c", "a b --output f c", "--output f a b c"):
        options = cli._parse(["report", *words.split()])
        assert (options.runs, options.output) == (expected, "f")
    assert cli._parse(["eval", "a", "--resume", "b"]).overrides == ["b"]


@pytest.mark.parametrize(
    "words",
    ["train c.yaml a=1 --resum-it", "grade answers.jsonl a=1", "grade a.jsonl --explain 1 b.jsonl"],
)
def test_words_that_no_command_takes_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli._parse(words.split())
    assert stopped.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_a_word_that_is_no_override_is_named(tiny, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", sft_config(tmp_path / "run", tiny()))
    for words in (["oops", "--dry-run"], ["--dry-run", "oops"]):
        assert cli.main(["sft", config, *words]) == 2
        assert "oops: an override must have the form key=value" in capsys.readouterr().err


def start(*arguments: str, stdout: int, unbuffered: str = "") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "grpo", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {"PYTHONUNBUFFERED": unbuffered},
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_ends_the_command_quietly(tiny, tmp_path, unbuffered):
    """`grpo doctor CONFIG | head -1`."""
    config = write_config(tmp_path / "c.yaml", sft_config(tmp_path / "run", tiny()))
    pipe = subprocess.PIPE
    process = start("doctor", config, "--no-sample", stdout=pipe, unbuffered=unbuffered)
    assert process.stdout.readline().startswith("ok    batch")
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""


@pytest.mark.parametrize("command", [[], ["train"]])
def test_a_reader_that_never_came_is_no_error_of_a_finished_command(command):
    """What is printed is written out at the end only, when Python exits."""
    reader, writer = os.pipe()
    os.close(reader)
    process = start(*command, "--help", stdout=writer)
    os.close(writer)
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""


def test_a_broken_pipe_inside_is_an_error_like_any_other(monkeypatch, capsys):
    def lost(options):
        raise BrokenPipeError("the pipe to the engine")

    monkeypatch.setattr(cli, "_grade", lost)
    assert cli.main(["grade", "answers.jsonl"]) == 1
    errors = capsys.readouterr().err
    assert "Traceback" in errors and "grpo: BrokenPipeError: the pipe to the engine" in errors
