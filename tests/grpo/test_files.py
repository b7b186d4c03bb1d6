"""Shipped configs and launch scripts: found from every directory, and copied by `grpo files`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo import cli, files
from grpo import config as configs
from grpo.config.reading import read_yaml
from grpo.types import UserError

ROOT = Path(__file__).parents[2]


def test_a_config_that_is_not_in_the_working_directory_is_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = read_yaml("configs/tiny.yaml")
    assert tiny == read_yaml(str(ROOT / "configs" / "tiny.yaml"))
    (tmp_path / "configs").mkdir()
    assert read_yaml("configs/tiny.yaml") == tiny
    (tmp_path / "configs" / "tiny.yaml").write_text("seed: 5")
    assert read_yaml("configs/tiny.yaml") == {"seed": 5}


@pytest.mark.parametrize(
    "path",
    ["tiny.yaml", "launch/server.sh", "configs/none.yaml", "configs/distill_vs_rl", "x/configs/a"],
)
def test_other_paths_are_those_of_the_working_directory(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.find_file(path) == Path(path)
    assert files.find_file("~/a.yaml") == Path.home() / "a.yaml"


@pytest.mark.parametrize(
    ("command", "config"),
    [("train", "tiny"), ("pipeline", "r1_tiny"), ("pipeline", "distill_vs_rl/pipeline")],
)
def test_the_files_that_a_shipped_config_names_are_found_too(
    command, config, tmp_path, monkeypatch, capsys
):
    """A warm start, and the configs of a pipeline's stages."""
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, f"configs/{config}.yaml", "--dry-run"]) == 0
    assert "configs/tiny_sft.yaml" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_chat_template_of_a_shipped_config_is_found(tiny, tmp_path, monkeypatch):
    from grpo.experience.prompts import Prompts
    from grpo.learning import models

    monkeypatch.chdir(tmp_path)
    settings = configs.PromptSettings(template="chat", chat_template="configs/llama3.jinja")
    prompts = Prompts(settings, models.load_tokenizer(tiny()))
    template = (ROOT / "configs" / "llama3.jinja").read_text()
    assert prompts.chat_template_to_save() == template


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("configs/tinny.yaml", "did you mean configs/tiny.yaml"),
        ("tiny", "did you mean configs/tiny.yaml or "),
        ("gsm8k_qwen2.5_05b.yaml", "did you mean configs/gsm8k_qwen2.5_0.5b.yaml"),
        ("zzz.yaml", "not found. `grpo files` prints the folder with the shipped configs"),
    ],
)
def test_the_error_of_an_unknown_config_names_the_nearest_shipped_ones(
    path, hint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"grpo: {path}: config file not found")
    assert hint in line


def test_the_folder_is_printed_without_the_dependencies(tmp_path):
    """It contains the pinned versions with which the dependencies are installed."""
    command = [sys.executable, "-S", "-m", "grpo", "files"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    output = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
    folder = Path(output.strip())
    assert (folder / "launch" / "requirements-cpu.txt").is_file()
    assert (folder / "configs" / "tiny.yaml").is_file()


def test_a_copy_has_the_files_that_work_without_a_clone(tmp_path, capsys):
    target = tmp_path / "new" / "project"
    assert cli.main(["files", "--copy", str(target)]) == 0
    for name in ("configs", "launch"):
        copied = {path.relative_to(target) for path in (target / name).rglob("*")}
        expected = {
            path.relative_to(ROOT)
            for path in (ROOT / name).rglob("*")
            if path.name not in files.CLONE_ONLY and "__pycache__" not in path.parts
        }
        assert copied == expected
    assert not any(path.is_symlink() for path in target.rglob("*"))
    assert os.access(target / "launch" / "torchrun.sh", os.X_OK)
    assert cli.main(["files", "--copy", str(target)]) == 2
    assert f"{target / 'configs'} exists. Choose a folder without" in capsys.readouterr().err


def test_a_copy_into_the_shipped_files_is_an_error():
    for target in (files.FOLDER / "configs", files.FOLDER / "launch" / "new"):
        with pytest.raises(UserError, match="this is a folder of the shipped files"):
            files.copy_files(target)
    assert not (files.FOLDER / "launch" / "new").exists()


def test_a_copy_into_a_file_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--copy .*/file: cannot be written: "):
        files.copy_files(tmp_path / "file")
