"""A wheel in a fresh environment, used from an empty folder as after `pip install grpo-trainer`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.run.fingerprints import fingerprint_code

pytestmark = [pytest.mark.engine, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "grpo", "rewards", "data", "configs", "launch")
# Names of this checkout's own installation, which the fresh environment must not see.
INSTALLATION = ("grpo_trainer-", "grpo-", "__editable__", "gpukit.pth")
# Packages in the user's folder with the names of two packages of grpo.
OWN_REWARD = """
TIMEOUT_S = 10  # the function runs in a worker process


def brevity(completion, problem):
    return 1 / len(completion.token_ids)
"""
OWN_DATA = """
from grpo.types import Problem


def load(split, *, seed, path):
    return [
        Problem(id=f"{split}-{n}", question=f"{n}+1=", answer=str(n + 1), source="sums")
        for n in range(20)
    ]
"""


def link_dependencies(target):
    """Links the installed packages into `target`, except grpo itself."""
    target.mkdir()
    for folder in sys.path:
        if Path(folder).name != "site-packages":
            continue
        for path in Path(folder).iterdir():
            link = target / path.name
            if not path.name.startswith(INSTALLATION) and not link.exists():
                link.symlink_to(path)


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory):
    """Returns the folder with the commands of an environment in which a wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    project = folder / "project"
    project.mkdir()
    for name in SOURCES:
        subprocess.run(["cp", "--recursive", "--no-dereference", ROOT / name, project], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    command = [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, project]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True)
    dependencies = folder / "dependencies"
    link_dependencies(dependencies)
    (site_packages,) = (folder / "env" / "lib").glob("python3*/site-packages")
    (site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return folder / "env" / "bin"


@pytest.fixture
def run(bin_folder, tmp_path, monkeypatch):
    """Returns `run(*words)`, which runs a command of the environment in an empty folder."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")

    def run_command(*words, code=0):
        process = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert process.returncode == code, process.stderr[-3000:]
        return process.stdout

    return run_command


def test_the_environment_has_the_wheel_and_not_this_checkout(run, bin_folder):
    program = "import grpo, importlib.util as u; print(grpo.__file__, u.find_spec('rewards'))"
    location, spec = run("python", "-c", program).split()
    assert Path(location).is_relative_to(bin_folder.parent)
    assert spec == "None"
    assert run("grpo", "--version") == "0.1.0.dev0\n"
    assert run("python", "-m", "grpo", "--version") == "0.1.0.dev0\n"


def test_the_code_of_the_wheel_has_the_fingerprint_of_the_checkout(run):
    program = "from grpo.run import fingerprints; print(fingerprints.fingerprint_code())"
    assert run("python", "-c", program).strip() == fingerprint_code()


def test_a_shipped_config_is_used_from_an_empty_folder(run, tmp_path):
    output = run("grpo", "train", "configs/tiny.yaml", "--dry-run")
    assert "warm start  configs/tiny_sft.yaml" in output
    assert list(tmp_path.iterdir()) == []


def test_packages_of_the_user_called_rewards_and_data_are_used(run, tmp_path):
    for package, module, text in (("rewards", "mine", OWN_REWARD), ("data", "sums", OWN_DATA)):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / f"{module}.py").write_text(text)
    run(
        "grpo",
        "train",
        "configs/tiny.yaml",
        "model={path: micro-qwen2}",
        "data={name: 'data.sums:load'}",
        "rewards={accuracy: 1.0, 'rewards.mine:brevity': 0.5}",
        "train={rollouts: 1, problems: 4, group_size: 4}",
        "sampling={max_tokens: 8}",
        "eval={every: 0}",
        "checkpoint={every: 0}",
        "run_dir=run",
    )
    assert "reward/rewards.mine:brevity" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"grpo-trainer": "0.1.0.dev0"' in (tmp_path / "run" / "manifest.json").read_text()


def test_the_copied_launch_scripts_run(run, tmp_path):
    folder = Path(run("grpo", "files").strip())
    assert (folder / "launch" / "requirements-cpu.txt").is_file()
    run("grpo", "files", "--copy", "project")
    launch = tmp_path / "project" / "launch"
    assert os.access(launch / "quickstart.sh", os.X_OK)
    output = run(str(launch / "torchrun.sh"), "train", "configs/tiny.yaml", "--dry-run")
    assert "warm start" in output
