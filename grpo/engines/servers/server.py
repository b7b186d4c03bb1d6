"""One vLLM server of a pool: its process, its command line, what it may see of this machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from grpo import config as configs
from grpo.engines import EngineError
from grpo.engines.local.engine import environment, llm_arguments
from grpo.engines.servers.plugin import TOKEN
from grpo.learning import models
from grpo.run import ranks
from grpo.types import Completion, UserError

COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")


@dataclass(kw_only=True, eq=False)
class Server:
    """One server as the pool sees it.

    `version`: of the weights that it holds, -1 for none; only then is it asked nothing.
    """

    url: str
    log_file: Path | None = None
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    cores: frozenset[int] = frozenset()  # those of this machine that it is held to
    process: subprocess.Popen[bytes] | None = None
    up: bool = False
    version: int = -1
    starts: int = 0  # how often it was started here, or came up
    load: int = 0  # completions asked for and not there yet
    heard: float = 0.0  # when it last answered
    tokens: float = -1.0  # made since its start, at the last look ...
    moved: float = 0.0  # ... and when that number last changed
    avoid: float = 0.0  # where it is not watched: not to be asked before then

    @property
    def local(self) -> bool:
        """Returns whether the pool starts this server; it does not for `engine.servers.urls`."""
        return bool(self.command)

    def start(self, port: int | None = None) -> None:
        """Starts the process, at another port if one is given."""
        assert self.log_file is not None
        if port is not None:
            self.command[-1], self.url = str(port), f"http://127.0.0.1:{port}"
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=(lambda: os.sched_setaffinity(0, self.cores)) if self.cores else None,
            )

    def kill(self) -> None:
        """Kills the process, if one was started, with its group, and waits for its end."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def told(self) -> str:
        """Returns how the process ended, if it did, and where to read more."""
        code = None if self.process is None else self.process.poll()
        how = (
            ""
            if code is None
            else f" (killed by {signal.Signals(-code).name})"
            if code < 0
            else f" (exit code {code})"
        )
        return f"{self.url}{how}{f'; its log: {self.log_file}' if self.log_file else ''}"


def arguments(
    model_dir: str, settings: configs.Engine, dtype: str, max_model_len: int, float32_head: bool
) -> list[str]:
    """Returns the server's command line.

    The arguments are those of the child process (grpo/engines/local/engine.py), spelled as
    vLLM's options.
    """
    assert settings.servers is not None
    given = llm_arguments(model_dir, settings, dtype, max_model_len, torch.cuda.is_available()) | {
        "logprobs_mode": "processed_logprobs"
    }
    given |= {
        "tensor_parallel_size": settings.servers.tensor_parallel,
        "uvicorn_log_level": "warning",
    }
    given.pop("enable_sleep_mode", None)
    words = ["--enable-scale-out", "--middleware", "grpo.engines.servers.plugin.Guard"]
    words += ["--hf-overrides", '{"head_dtype": "float32"}'] if float32_head else []
    for name, value in given.items():
        option = name.replace("_", "-")
        words += (
            ([f"--{option}"] if value else [f"--no-{option}"])
            if isinstance(value, bool)
            else [f"--{option}", str(value)]
        )
    return words


def check_split(model_dir: str, size: int) -> None:
    """Raises UserError for a model whose attention heads `size` GPUs cannot share."""
    config = json.loads((Path(model_dir) / "config.json").read_text())
    heads, shared = (
        config.get("num_attention_heads", size),
        config.get("num_key_value_heads") or size,
    )
    if heads % size or (shared % size and size % shared):
        raise UserError(
            f"engine.servers.tensor_parallel={size} does not divide the model's {heads} heads and "
            f"{shared} key-value heads"
        )


def cores_of(number: int, pool: configs.Servers) -> frozenset[int]:
    """Returns a local server's share of the cores.

    On a machine with GPUs a server is not bound to cores, and the set is empty.
    """
    if torch.cuda.is_available():
        return frozenset()
    cores = pool.cores or sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // pool.count)
    return frozenset(cores[(number * share + i) % len(cores)] for i in range(share))


def environment_of(
    token: str, number: int, pool: configs.Servers, cores: frozenset[int]
) -> dict[str, str]:
    """Returns a local server's environment.

    It holds the server's token and its GPUs (after those of the ranks) or its cores. Raises
    UserError.
    """
    made = _base(pool.tensor_parallel) | {TOKEN: token, "GRPO_ENGINE": str(os.getpid())}
    if torch.cuda.is_available():
        size, here = pool.tensor_parallel, torch.cuda.device_count()
        first = ranks.local_count() + number * size
        if first + size > here:
            raise UserError(
                f"{ranks.local_count()} learner ranks and {pool.count} servers of {size} GPUs do "
                f"not fit on this machine's {here}: lower "
                "engine.servers.count or the ranks"
            )
        own = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
        return made | {
            "CUDA_VISIBLE_DEVICES": ",".join(
                own[i] if own else str(i) for i in range(first, first + size)
            )
        }
    # of each of its workers
    own, share = sorted(map(str, cores)), max(1, len(cores) // pool.tensor_parallel)
    bound = "|".join(
        ",".join((2 * own)[i * share % len(own) :][:share]) for i in range(pool.tensor_parallel)
    )
    return made | {
        "OMP_NUM_THREADS": str(share),
        "VLLM_CPU_OMP_THREADS_BIND": bound,
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }


def _base(tensor_parallel: int) -> dict[str, str]:
    """On a CPU the model runs in the process that schedules.

    Two would poll each other, and for a second after the last request.
    """
    apart = torch.cuda.is_available() or tensor_parallel > 1
    return environment() | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if apart else "0",
    }


def free_port() -> int:
    """Returns a TCP port that is free on 127.0.0.1 at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def transfer_of(pool: configs.Servers, cuda: bool) -> str:
    """Returns how weights reach the servers. Raises UserError."""
    if not any(
        found.name == "grpo"
        for found in importlib.metadata.entry_points(group="vllm.general_plugins")
    ):
        raise UserError(
            "engine.servers: vLLM does not see grpo's plugin: install the package again "
            "(./launch/setup.sh)"
        )
    if pool.transfer == "nccl" and not cuda:
        raise UserError(
            "engine.servers.transfer=nccl needs GPUs on both sides: use memory (one machine) or "
            "file (a shared directory)"
        )
    return (
        pool.transfer
        if pool.transfer != "auto"
        else "nccl"
        if cuda
        else "file"
        if pool.urls
        else "memory"
    )


def token_of(pool: configs.Servers) -> str:
    """Returns what all requests bring: for `urls` the user's, else one made up for this run.

    Raises UserError.
    """
    given = os.environ.get(pool.token_env, "")
    if pool.urls and not given:
        raise UserError(
            f"engine.servers.token_env: {pool.token_env} is not set; every server of urls asks "
            "for it (launch/server.sh)"
        )
    return ranks.gather("the servers' token", given or secrets.token_hex(16))[0]


def completion_of(
    choice: dict[str, Any], decode: Callable[[Sequence[int]], str], version: int
) -> Completion:
    """Returns a completion of a server's answer.

    `version`: of its tokens where the server tells none. Raises EngineError.
    """
    ids, stopped = (
        tuple(choice["token_ids"]),
        choice["finish_reason"] == "stop" and not isinstance(choice["stop_reason"], str),
    )
    spans = tuple(
        (number_of(span["version"]), span["start"], span["end"])
        for span in choice["weight_versions"] or ()
    )
    if spans and [0, *(end for _, _, end in spans)] != [
        *(start for _, start, _ in spans),
        len(ids),
    ]:
        raise EngineError(f"the versions of a completion's {len(ids)} tokens have gaps: {spans}")
    return Completion(
        token_ids=ids,
        logprobs=tuple(entry["logprob"] for entry in choice["logprobs"]["content"]),
        text=decode(ids[:-1] if stopped else ids),
        finish_reason=choice["finish_reason"],
        versions=spans or ((version, 0, len(ids)),),
    )


def number_of(version: str) -> int:
    """Returns a server's weight version as a number, -1 if it is not one."""
    return int(version) if version.lstrip("-").isdecimal() else -1


def difference(
    first: Sequence[tuple[Completion, ...]], second: Sequence[tuple[Completion, ...]]
) -> float:
    """Returns the mean |difference of logprobs| of two samplings of the same requests.

    Two completions are compared as far as their tokens agree.
    """
    gaps: list[float] = []
    for one, two in zip(first, second, strict=True):
        for a, b in zip(one, two, strict=True):
            for token, other, logprob, theirs in zip(
                a.token_ids, b.token_ids, a.logprobs, b.logprobs, strict=False
            ):
                if token != other:
                    gaps += [] if gaps else [1.0]
                    break
                gaps.append(abs(logprob - theirs))
    return sum(gaps) / len(gaps)


def main(config_file: str, port: str, overrides: list[str]) -> None:
    """Becomes a server for `engine.servers.urls` of this train config.

    It uses this node's GPUs, is open to the network and is guarded by the token.
    """
    config: configs.Config = configs.load(config_file, overrides)
    if not os.environ.get(TOKEN):
        raise UserError(f"{TOKEN} is not set: choose one for all servers and the trainer")
    settings = config.engine.model_copy(
        update={"servers": config.engine.servers or configs.Servers(urls=["here"])}
    )
    model_dir = models.locate(
        config.model, Path(tempfile.mkdtemp(prefix="grpo-server-")), config.seed
    )
    words = arguments(
        str(model_dir),
        settings,
        config.engine.dtype or config.model.dtype,
        config.max_sequence_tokens,
        config.model.float32_head,
    )
    servers = settings.servers or configs.Servers(urls=["here"])
    backend = f"grpo_{transfer_of(servers, torch.cuda.is_available())}"
    words += [
        "--weight-transfer-config",
        json.dumps({"backend": backend}),
        "--load-format",
        "dummy",
    ]
    made = _base(settings.servers.tensor_parallel if settings.servers else 1) | {
        TOKEN: os.environ[TOKEN]
    }
    os.execve(sys.executable, [*COMMAND, *words, "--host", "0.0.0.0", "--port", port], made)


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
    except UserError as error:
        print(f"grpo: {error}", file=sys.stderr)
        sys.exit(2)
