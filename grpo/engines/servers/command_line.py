"""How a server is started: its command line, environment, cores and token."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from grpo import config as configs
from grpo.engines.servers.guard import TOKEN_VARIABLE
from grpo.engines.servers.plugin import TRAINER_PID_VARIABLE
from grpo.engines.vllm_options import ServedModel, llm_arguments, vllm_environment
from grpo.run import ranks
from grpo.types import UserError

COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
GUARD = "grpo.engines.servers.guard.Guard"


def server_arguments(
    model: ServedModel, settings: configs.Engine, tensor_parallel: int, backend: str
) -> list[str]:
    """Returns the arguments of COMMAND without host and port.

    They are those of the child process, spelled as vLLM's options. `backend` is the weight
    sender's.
    """
    options = llm_arguments(model, settings, cuda=torch.cuda.is_available())
    options.pop("enable_sleep_mode", None)
    options["logprobs_mode"] = "processed_logprobs"
    options["tensor_parallel_size"] = tensor_parallel
    options["uvicorn_log_level"] = "warning"
    words = ["--enable-scale-out", "--middleware", GUARD]
    for name, value in options.items():
        option = name.replace("_", "-")
        if value is True:
            words.append(f"--{option}")
        elif value is False:
            words.append(f"--no-{option}")
        elif isinstance(value, dict):
            words += [f"--{option}", json.dumps(value)]
        else:
            words += [f"--{option}", str(value)]
    words += ["--weight-transfer-config", json.dumps({"backend": backend})]
    return words


def check_tensor_parallel(model_dir: str, tensor_parallel: int) -> None:
    """Raises UserError if the number of attention heads is not divisible by `tensor_parallel`."""
    config = json.loads((Path(model_dir) / "config.json").read_text())
    heads = config.get("num_attention_heads", tensor_parallel)
    key_value_heads = config.get("num_key_value_heads") or tensor_parallel
    # fewer key-value heads than GPUs are copied to several GPUs
    divides_key_value_heads = (
        key_value_heads % tensor_parallel == 0 or tensor_parallel % key_value_heads == 0
    )
    if heads % tensor_parallel != 0 or not divides_key_value_heads:
        raise UserError(
            f"engine.servers.tensor_parallel={tensor_parallel} does not divide the model's {heads} "
            f"heads and {key_value_heads} key-value heads"
        )


def server_cores(number: int, servers: configs.Servers) -> frozenset[int]:
    """Returns local server `number`'s share of the cores, empty (all cores) on a GPU machine."""
    if torch.cuda.is_available():
        return frozenset()
    cores = servers.cores or sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // servers.count)
    first = number * share
    return frozenset(cores[(first + i) % len(cores)] for i in range(share))


def server_environment(
    token: str, number: int, servers: configs.Servers, cores: frozenset[int]
) -> dict[str, str]:
    """Returns local server `number`'s environment, with its token and its GPUs or its cores.

    Its GPUs follow those of the learner's ranks. Raises UserError if there are not enough.
    """
    environment = base_environment(servers.tensor_parallel)
    environment[TOKEN_VARIABLE] = token
    environment[TRAINER_PID_VARIABLE] = str(os.getpid())
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = _server_gpus(number, servers)
        return environment
    num_threads = max(1, len(cores) // servers.tensor_parallel)
    environment["OMP_NUM_THREADS"] = str(num_threads)
    environment["VLLM_CPU_OMP_THREADS_BIND"] = _worker_cores(
        sorted(map(str, cores)), num_threads, servers.tensor_parallel
    )
    environment["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    return environment


def _server_gpus(number: int, servers: configs.Servers) -> str:
    """Returns the CUDA_VISIBLE_DEVICES of local server `number`: "4,5"."""
    size = servers.tensor_parallel
    num_gpus = torch.cuda.device_count()
    first = ranks.local_world_size() + number * size
    if first + size > num_gpus:
        raise UserError(
            f"{ranks.local_world_size()} learner ranks and {servers.count} servers of {size} GPUs "
            f"do not fit on this machine's {num_gpus}: lower engine.servers.count or the ranks"
        )
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = [visible[i] if visible else str(i) for i in range(first, first + size)]
    return ",".join(devices)


def _worker_cores(cores: Sequence[str], num_threads: int, num_workers: int) -> str:
    """Returns the cores of each worker of a server, as vLLM reads them: "0,1|2,3"."""
    twice = [*cores, *cores]
    workers = []
    for worker in range(num_workers):
        first = worker * num_threads % len(cores)
        workers.append(",".join(twice[first : first + num_threads]))
    return "|".join(workers)


def base_environment(tensor_parallel: int) -> dict[str, str]:
    """Returns the environment of a server of any machine, without token, GPUs and cores.

    On a CPU the model runs in the process that schedules: two processes would poll each other, and
    for a second after the last request.
    """
    has_own_core_process = torch.cuda.is_available() or tensor_parallel > 1
    environment = vllm_environment()
    environment["VLLM_SERVER_DEV_MODE"] = "1"
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if has_own_core_process else "0"
    return environment


def request_token(servers: configs.Servers) -> str:
    """Returns the token that every request carries, the same on all ranks.

    It is the user's for `engine.servers.urls`, else one made for this run. Raises UserError if the
    user's is not set.
    """
    token = os.environ.get(servers.token_env, "")
    if servers.urls and not token:
        raise UserError(
            f"engine.servers.token_env: {servers.token_env} is not set; every server of urls asks "
            "for it (launch/server.sh)"
        )
    return ranks.all_gather("the servers' token", token or secrets.token_hex(16))[0]
