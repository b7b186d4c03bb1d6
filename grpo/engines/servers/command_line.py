"""Command line, environment, CPU cores and token of a server process."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    model: ServedModel, settings: configs.EngineSettings, tensor_parallel: int, backend: str
) -> list[str]:
    """Returns the arguments of COMMAND except host and port.

    They include the arguments of `llm_arguments`, as vLLM's command line options, except the sleep
    mode.

    Args:
        model: the model to serve.
        settings: the engine section of the config.
        tensor_parallel: GPUs per server.
        backend: vLLM's name of the weight transfer engine (`WeightSender.backend`).
    """
    options = llm_arguments(model, settings, cuda=torch.cuda.is_available())
    options.pop("enable_sleep_mode", None)
    options["logprobs_mode"] = "processed_logprobs"
    options["tensor_parallel_size"] = tensor_parallel
    options["uvicorn_log_level"] = "warning"
    arguments = ["--enable-scale-out", "--middleware", GUARD]
    for name, value in options.items():
        arguments += _option_arguments(name.replace("_", "-"), value)
    arguments += ["--weight-transfer-config", json.dumps({"backend": backend})]
    return arguments


def _option_arguments(option: str, value: Any) -> list[str]:
    """Returns an option as arguments: `["--no-x"]`, `["--x", "1"]` or `["--x", '{"a": 1}']`."""
    if value is True:
        return [f"--{option}"]
    if value is False:
        return [f"--no-{option}"]
    if isinstance(value, dict):
        return [f"--{option}", json.dumps(value)]
    return [f"--{option}", str(value)]


def check_tensor_parallel(model_dir: str, tensor_parallel: int) -> None:
    """Raises UserError if the model's attention heads cannot be split into `tensor_parallel`."""
    config = json.loads((Path(model_dir) / "config.json").read_text())
    # An entry that the config does not have passes the check.
    num_heads = config.get("num_attention_heads", tensor_parallel)
    num_kv_heads = config.get("num_key_value_heads") or tensor_parallel
    # vLLM replicates key-value heads if there are fewer of them than GPUs.
    can_split_kv_heads = num_kv_heads % tensor_parallel == 0 or tensor_parallel % num_kv_heads == 0
    if num_heads % tensor_parallel != 0 or not can_split_kv_heads:
        raise UserError(
            f"engine.servers.tensor_parallel={tensor_parallel} does not divide the model's "
            f"{num_heads} attention heads and {num_kv_heads} key-value heads: set it to a divisor "
            "of the attention heads that is a divisor or a multiple of the key-value heads"
        )


def server_cores(server_index: int, servers: configs.ServerSettings) -> frozenset[int]:
    """Returns the CPU cores of a local server.

    The local servers share the cores equally. On a machine with GPUs the result is empty, which
    means all cores.
    """
    if torch.cuda.is_available():
        return frozenset()
    cores = servers.cores or sorted(os.sched_getaffinity(0))
    cores_per_server = max(1, len(cores) // servers.count)
    first = server_index * cores_per_server
    return frozenset(cores[(first + i) % len(cores)] for i in range(cores_per_server))


def server_environment(
    token: str, server_index: int, settings: configs.EngineSettings, cores: frozenset[int]
) -> dict[str, str]:
    """Returns the environment of a local server, with its token and its GPUs or CPU cores.

    Args:
        token: the token of the servers.
        server_index: the number of the server, from 0.
        settings: the section `engine` of the config, which has the section `servers`.
        cores: the CPU cores of the server, from `server_cores`.

    Raises:
        UserError: The machine has too few GPUs.
    """
    servers = settings.servers
    assert servers is not None
    environment = base_environment(settings, servers.tensor_parallel)
    environment[TOKEN_VARIABLE] = token
    environment[TRAINER_PID_VARIABLE] = str(os.getpid())
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = _server_gpus(server_index, servers)
        return environment
    threads_per_worker = max(1, len(cores) // servers.tensor_parallel)
    environment["OMP_NUM_THREADS"] = str(threads_per_worker)
    environment["VLLM_CPU_OMP_THREADS_BIND"] = _worker_cores(
        sorted(map(str, cores)), threads_per_worker, servers.tensor_parallel
    )
    environment["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    return environment


def _server_gpus(server_index: int, servers: configs.ServerSettings) -> str:
    """Returns the CUDA_VISIBLE_DEVICES of a local server: "4,5".

    The learner's ranks use the first GPUs of the machine, the servers the GPUs after them.
    """
    num_ranks = ranks.local_world_size()
    gpus_per_server = servers.tensor_parallel
    num_gpus = torch.cuda.device_count()
    first = num_ranks + server_index * gpus_per_server
    if first + gpus_per_server > num_gpus:
        num_needed = num_ranks + servers.count * gpus_per_server
        raise UserError(
            f"{num_ranks} learner ranks and {servers.count} servers with {gpus_per_server} GPUs "
            f"per server need {num_needed} GPUs, but this machine has {num_gpus}: lower "
            "engine.servers.count, engine.servers.tensor_parallel or the number of ranks"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = [name for name in visible.split(",") if name]
    if not devices:
        devices = [str(i) for i in range(num_gpus)]
    return ",".join(devices[first : first + gpus_per_server])


def _worker_cores(cores: Sequence[str], threads_per_worker: int, num_workers: int) -> str:
    """Returns the cores of each worker of a server in vLLM's format: "0,1|2,3"."""
    repeated_cores = [*cores, *cores]
    cores_of_workers = []
    for worker in range(num_workers):
        first = worker * threads_per_worker % len(cores)
        cores_of_workers.append(",".join(repeated_cores[first : first + threads_per_worker]))
    return "|".join(cores_of_workers)


def base_environment(settings: configs.EngineSettings, tensor_parallel: int) -> dict[str, str]:
    """Returns the environment of any server, without token, GPUs and CPU cores.

    On a CPU with one worker, vLLM's engine core runs in the process of the HTTP server. Separate
    processes would poll each other, and keep polling for one second after the last request.

    Args:
        settings: the section `engine` of the config.
        tensor_parallel: GPUs per server.
    """
    has_core_process = torch.cuda.is_available() or tensor_parallel > 1
    environment = vllm_environment(settings)
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # adds the routes that update weights and pause
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if has_core_process else "0"
    return environment


def server_token(servers: configs.ServerSettings) -> str:
    """Returns the token of the servers, the same on all ranks.

    It is the value of the variable `engine.servers.token_env`, or random for local servers without
    that variable.

    Raises:
        UserError: `engine.servers.urls` is set and the variable is not.
    """
    token = os.environ.get(servers.token_env, "")
    if servers.urls and not token:
        raise UserError(
            f"engine.servers.token_env: {servers.token_env} is not set; set it to the token of the "
            "servers of engine.servers.urls (launch/server.sh)"
        )
    if not token:
        token = secrets.token_hex(16)
    return ranks.all_gather("the server token", token)[0]
