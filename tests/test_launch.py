"""What lies in launch/ is well-formed.

Shell scripts, the Slurm job's header, the Kubernetes job; the server's command line.
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
from whole_runs import OF_RANKS, wait_for, write_config

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_are_strict(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert "set -euo pipefail" in script.read_text() and os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--exclude=SC1091", str(script)], check=True)


def test_a_server_that_dies_is_started_again_and_a_mistake_or_a_signal_ends_it(tmp_path):
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "server.sh", tmp_path / "launch")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(
        '#!/bin/bash\necho started >>"$LOG"; [[ -n "$CODE" ]] && exit "$CODE"; exec sleep 60\n'
    )
    python.chmod(0o755)
    log, command = tmp_path / "log", [str(tmp_path / "launch" / "server.sh"), "config.yaml", "8000"]
    for code, restarts, starts in (("9", "1", 2), ("2", "1", 1), ("0", "0", 1)):
        log.unlink(missing_ok=True)
        made = os.environ | {"LOG": str(log), "CODE": code, "RESTARTS": restarts}
        assert subprocess.run(command, env=made, capture_output=True).returncode == int(code)
        assert len(log.read_text().splitlines()) == starts
    log.unlink()
    server = subprocess.Popen(command, env=os.environ | {"LOG": str(log), "CODE": ""})
    wait_for(log.exists, seconds=10)
    server.terminate()
    assert server.wait(10) == 143 and len(log.read_text().splitlines()) == 1


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sh", "server.sh"])
def test_scripts_say_how_they_are_used(script):
    done = subprocess.run([str(LAUNCH / script)], capture_output=True, text=True)
    assert done.returncode == 2 and "launch/" in done.stdout + done.stderr


# a cluster of three nodes; srun shows what it was asked, and ends at once unless the job is to be
# preempted
FAKES = {
    "scontrol": '[ "$1" = show ] && printf "n1\\nn2\\nn3\\n" || echo "scontrol $*" >>"$LOG"',
    "srun": 'printf "%s\\n" "srun $*" >>"$LOG"\ncase "$*" in *learner*) [ '
    '-z "$HOLD" ] || { trap "exit 1" TERM; sleep 20 & wait; } ;; esac',
}


def slurm(tmp_path, **environment):
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_JOB_ID": "7",
    }
    return subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sh"), "train", "configs/tiny.yaml", "seed=1"],
        env=os.environ | given | {"HOLD": ""} | environment,
    )


def test_the_slurm_job_shares_its_nodes_among_learners_and_servers(tmp_path):
    assert slurm(tmp_path, ENGINE_NODES="1", TENSOR_PARALLEL="4").wait(30) == 0
    # the servers' steps are begun in the background
    wait_for(lambda: len((tmp_path / "log").read_text().splitlines()) >= 3, seconds=10)
    asked = (tmp_path / "log").read_text().splitlines()
    (learner,) = [line for line in asked if "slurm-%j-learner" in line]
    servers = [line for line in asked if "server.sh" in line]
    assert (
        "--nodelist=n1,n2" in learner
        and "--nnodes=2" in learner
        and "--rdzv-endpoint=n1:29500" in learner
        and "seed=1" in learner
    )
    assert (
        "engine.servers={urls: [http://n3:8000,http://n3:8001], tensor_parallel: 4}" in learner
        and learner.endswith("--auto-resume")
    )
    assert len(servers) == 2 and all("--nodelist=n3" in line for line in servers)
    assert sorted(re.findall(r"CUDA_VISIBLE_DEVICES=(\S+)", " ".join(servers))) == [
        "0,1,2,3",
        "4,5,6,7",
    ]


def test_a_preempted_job_goes_back_into_the_queue(tmp_path):
    process = slurm(tmp_path, HOLD="1")
    while not (tmp_path / "log").exists():
        assert process.poll() is None
    time.sleep(0.5)
    process.terminate()
    assert process.wait(30) != 0
    asked = (tmp_path / "log").read_text()
    assert "scontrol requeue 7" in asked


def test_tasks_of_srun_find_their_place_and_a_batch_script_is_alone(tmp_path, monkeypatch):
    from grpo.run import ranks

    (tmp_path / "scontrol").write_text("#!/usr/bin/env bash\nprintf 'n1\\nn2\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    of_ranks = (*OF_RANKS, "LOCAL_WORLD_SIZE")
    for name in of_ranks:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_JOB_ID": "7",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    ranks.adopt_slurm_variables()
    assert ranks.world_size() == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    ranks.adopt_slurm_variables()
    assert (ranks.rank(), ranks.world_size(), ranks.local_rank(), ranks.local_world_size()) == (
        3,
        4,
        1,
        2,
    )
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("n1", "20007")
    for name in of_ranks:
        monkeypatch.delenv(name)


def test_no_node_left_to_learn_is_refused(tmp_path):
    assert slurm(tmp_path, ENGINE_NODES="3").wait(30) == 2


def test_the_kubernetes_job_has_what_the_api_asks_for():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    # 100 MB of schemas: .ci/run installs them, launch/setup.sh does not
    if importlib.util.find_spec("kubernetes_validate"):
        validate = importlib.import_module("kubernetes_validate").validate
        assert validate(service, "1.30", strict=True) and validate(job, "1.30", strict=True)
    assert (service["apiVersion"], service["kind"], service["spec"]["clusterIP"]) == (
        "v1",
        "Service",
        "None",
    )
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert (
        set(spec) <= {"completionMode", "completions", "parallelism", "backoffLimit", "template"}
        and spec["completionMode"] == "Indexed"
    )
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (
        pod["restartPolicy"] in ("Never", "OnFailure")
        and pod["subdomain"] == service["metadata"]["name"]
    )
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= {
        volume["name"] for volume in pod["volumes"]
    }
    assert {"name", "image", "command", "args", "resources"} <= set(container)
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["NODES"] == str(spec["completions"]) == str(spec["parallelism"])
    assert (LAUNCH.parent / environment["CONFIG"]).exists()
    assert subprocess.run(["bash", "-n", "-c", container["args"][0]]).returncode == 0
    assert set(re.findall(r"\$\{?([A-Z_]+)", container["args"][0])) <= environment.keys() | {
        "JOB_COMPLETION_INDEX"
    }


def test_a_server_without_a_token_does_not_start(tiny, tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny()))
    environment = {name: value for name, value in os.environ.items() if name != "GRPO_ENGINE_TOKEN"}
    command = [sys.executable, "-m", "grpo.engines.servers", config, "8123"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "grpo: GRPO_ENGINE_TOKEN is not set" in done.stderr
