"""The command line: order of the arguments, invalid arguments, and closed output pipes."""

import os
import subprocess
import sys

import pytest
from stage_configs import sft_config
from whole_runs import process_environment, write_config

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
    "init": ["--model", "m", "--data", "d", "--gpus", "2"],
    "doctor": ["--price", "2"],
    "bench": ["--simulate", "h100"],
    "replay": ["--step", "3"],
}


def with_flag_at_each_position(flag: list[str]) -> list[list[str]]:
    """Returns the arguments of a command with the flag before, between and after the overrides."""
    first, second = OVERRIDES
    return [
        [*flag, "c.yaml", first, second],
        ["c.yaml", *flag, first, second],
        ["c.yaml", first, *flag, second],
        ["c.yaml", first, second, *flag],
    ]


@pytest.mark.parametrize("command", FLAGS)
def test_a_flag_can_be_before_between_or_after_the_overrides(command):
    parsed = [
        cli._parse([command, *arguments])
        for arguments in with_flag_at_each_position(FLAGS[command])
    ]
    for options in parsed:
        assert options.overrides == OVERRIDES
        assert vars(options) == vars(parsed[0])


def test_a_run_in_place_of_a_config_is_an_error_with_the_command_that_was_meant(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("run_dir: x")
    assert cli.main(["eval", str(tmp_path)]) == 2
    evaluation = (
        f"grpo eval {tmp_path}/config.yaml model.path={tmp_path} model.warm_start= run_dir="
    )
    assert evaluation in capsys.readouterr().err
    assert cli.main(["train", str(tmp_path), "train.rollouts=3"]) == 2
    assert f"Its config is {tmp_path}/config.yaml" in capsys.readouterr().err


def test_several_flags_can_be_mixed_with_overrides():
    options = cli._parse(["doctor", "c.yaml", "a=1", "--price", "2", "b=2", "--no-sample", "c=3"])
    assert options.overrides == ["a=1", "b=2", "c=3"]
    assert options.price == 2.0
    assert options.no_sample is True


def test_runs_and_overrides_can_follow_a_flag():
    for arguments in (
        "a b c --output f",
        "a --output f b c",
        "a b --output f c",
        "--output f a b c",
    ):
        options = cli._parse(["report", *arguments.split()])
        assert options.runs == ["a", "b", "c"]
        assert options.output == "f"
    assert cli._parse(["eval", "a", "--resume", "b"]).overrides == ["b"]


@pytest.mark.parametrize(
    "arguments",
    ["train c.yaml a=1 --resum-it", "grade a.jsonl --explain 1 --outpt b.jsonl"],
)
def test_unknown_arguments_are_errors(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        cli._parse(arguments.split())
    assert raised.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_an_argument_that_is_not_an_override_is_an_error_that_names_it(tiny, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", sft_config(tmp_path / "run", tiny()))
    for arguments in (["oops", "--dry-run"], ["--dry-run", "oops"]):
        assert cli.main(["sft", config, *arguments]) == 2
        assert "oops: an override must have the form key=value" in capsys.readouterr().err


def start_grpo(*arguments: str, stdout: int, unbuffered: str = "") -> subprocess.Popen:
    """Starts `grpo` with `unbuffered` as the value of PYTHONUNBUFFERED."""
    return subprocess.Popen(
        [sys.executable, "-m", "grpo", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=process_environment() | {"PYTHONUNBUFFERED": unbuffered},
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_ends_quietly_when_the_reader_closes_the_pipe(tiny, tmp_path, unbuffered):
    """As in `grpo doctor CONFIG | head -1`."""
    config = write_config(tmp_path / "c.yaml", sft_config(tmp_path / "run", tiny()))
    process = start_grpo(
        "doctor", config, "--no-sample", stdout=subprocess.PIPE, unbuffered=unbuffered
    )
    assert process.stdout.readline().startswith("ok    batch")
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""


@pytest.mark.parametrize("command", [[], ["train"]])
def test_a_command_succeeds_if_its_buffered_output_has_no_reader(command):
    """Python writes a short buffered output only at exit, after the command has succeeded."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = start_grpo(*command, "--help", stdout=write_end)
    os.close(write_end)
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""


def test_a_broken_pipe_other_than_standard_output_is_reported(monkeypatch, capsys):
    def raise_broken_pipe(options):
        raise BrokenPipeError("the pipe to the engine")

    monkeypatch.setattr(cli, "_grade", raise_broken_pipe)
    assert cli.main(["grade", "answers.jsonl"]) == 1
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert "grpo: BrokenPipeError: the pipe to the engine" in errors
