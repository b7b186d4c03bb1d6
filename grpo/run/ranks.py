"""The learner's ranks: who this process is, values from all to all, and work that is shared out.

One process alone is a group of one and needs no torch here. What a rollout samples is on all ranks
(`split_across_ranks`), so every decision about it is made alike everywhere; weights, gradients and
optimizer states are DeepSpeed's to share. Only rank 0 writes the run directory.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from grpo.run.addresses import free_port
from grpo.types import GrpoError, RunError, UserError

T = TypeVar("T")
_objects: Any = None  # gloo: Python values go over the CPU, whatever the gradients go over
_limit = timedelta(minutes=30)
_num_exchanges = 0  # calls of `all_gather` so far: equal on all ranks that run the same program


class BrokenExchangeError(RunError):
    """A rank failed inside a collective and cannot notify the others; it ends, and the job ends."""


class UnexpectedError(RunError):
    """An exception that is none of ours, as text that can be sent to every rank."""


class ExchangeMismatchError(RunError):
    """Ranks met in different exchanges: they do not run the same program, or not the same config.

    All ranks raise it, and nothing is saved together after it: they may not even agree on how far
    the run is. `exchanges`: per rank the name of the exchange and how many it has made.
    """

    def __init__(self, exchanges: Sequence[tuple[str, int]]) -> None:
        """`exchanges`: one per rank."""
        super().__init__(exchanges)
        self.exchanges = list(exchanges)

    def __str__(self) -> str:
        """Returns where each rank was."""
        where = "; ".join(
            f"rank {number}: {what!r}, exchange {made}"
            for number, (what, made) in enumerate(self.exchanges)
        )
        return f"the ranks met in different exchanges: {where}"


def rank() -> int:
    """Returns the rank of this process among all, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Returns how many ranks there are on all machines, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Returns the rank of this process on its machine, 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Returns how many ranks share this machine."""
    # torchrun's name, deepspeed's
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())


def adopt_srun() -> None:
    """Takes the place in the group from `srun`, which sets variables of its own.

    torchrun and deepspeed set torch's variables.
    """
    given = os.environ
    # a batch script is no step
    if "RANK" in given or int(given.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", given["SLURM_STEP_NODELIST"]],
        capture_output=True,
        text=True,
        check=True,
    )
    per_node = given.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].partition(",")[0]
    given |= {
        "RANK": given["SLURM_PROCID"],
        "WORLD_SIZE": given["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": given["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": per_node,
        "MASTER_ADDR": hosts.stdout.split()[0],
        "MASTER_PORT": str(20_000 + int(given["SLURM_JOB_ID"]) % 20_000),
    }


def num_cores() -> int:
    """Returns the number of cores that this process may use: all, or its share under Slurm."""
    return len(os.sched_getaffinity(0))


def join(limit_s: float = 1800.0) -> None:
    """Joins the process group, a group of one without a launcher.

    `limit_s`: the longest wait for another rank. Raises RunError, and UserError for more ranks than
    GPUs.
    """
    global _objects, _limit
    import torch

    if torch.distributed.is_initialized():
        return
    _limit = timedelta(seconds=limit_s)
    if world_size() == 1:
        _set_group_of_one()
    cuda = torch.cuda.is_available()
    if cuda:
        num_gpus = torch.cuda.device_count()
        if local_world_size() > num_gpus:
            raise UserError(
                f"{local_world_size()} ranks on this machine, which shows {num_gpus} GPUs: start "
                "one rank per GPU"
            )
        torch.cuda.set_device(local_rank())
    elif "OMP_NUM_THREADS" not in os.environ or world_size() > 1:  # torchrun sets 1
        torch.set_num_threads(max(1, num_cores() // local_world_size()))
    try:
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=_limit)
        if world_size() > 1:
            _objects = torch.distributed.new_group(backend="gloo", timeout=_limit)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"rank {rank()} of {world_size()}: no process group at "
            f"{os.environ.get('MASTER_ADDR')}: {str(error).splitlines()[0]}"
        ) from None
    atexit.register(_end_gloo_groups)


def _end_gloo_groups() -> None:
    """Ends the threads of gloo while the interpreter still runs.

    A thread that lets go of a tensor after the interpreter has ended aborts the process, and a run
    that has succeeded ends with SIGABRT (pytorch/pytorch#179291). The last exchange of a run is on
    `_objects`. DeepSpeed holds on to its groups of gloo, whose threads are idle by then. A group of
    NCCL ends with the process: to destroy it takes all ranks, and one may have failed.
    """
    global _objects
    from torch import distributed

    if not distributed.is_initialized():
        return
    objects, _objects = _objects, None
    if distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
    elif objects is not None:
        distributed.destroy_process_group(objects)


def _set_group_of_one() -> None:
    """Sets torch's variables as a launcher would for one rank, where they are not set."""
    variables = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def require_equal(fingerprints: Mapping[str, str]) -> None:
    """Raises UserError on all ranks naming what differs between them.

    `fingerprints`: what the ranks start from, by name: `{"config": "9f86d081884c7d65"}`.
    """
    of_ranks = all_gather("the fingerprints", dict(fingerprints))
    names = sorted(set().union(*of_ranks))  # the same on all ranks, which must all raise or none
    differing = [name for name in names if len({each.get(name) for each in of_ranks}) > 1]
    if not differing:
        return
    details = []
    for name in differing:
        values = ", ".join(f"rank {i} {each.get(name)}" for i, each in enumerate(of_ranks))
        details.append(f"{name}: {values}")
    error = UserError(
        f"the ranks do not start from the same {' and '.join(differing)} ({'; '.join(details)}): "
        "give all nodes the same files"
    )
    error.known_to_all_ranks = True
    raise error


def all_gather(what: str, value: T) -> list[T]:
    """Returns every rank's value, in order of ranks.

    Raises RunError naming `what` it waited for and the ranks that did not come. Raises
    ExchangeMismatchError on all ranks when they meet in different exchanges.
    """
    global _num_exchanges
    if world_size() == 1:
        return [value]
    import torch

    _num_exchanges += 1
    message = (what, _num_exchanges, value)
    messages: list[Any] = [None] * world_size()
    try:
        torch.distributed.monitored_barrier(_objects, timeout=_limit, wait_all_ranks=True)
        torch.distributed.all_gather_object(messages, message, group=_objects)
    except RuntimeError as error:
        raise RunError(
            f"rank {rank()}: another rank is lost, or did not come within {_limit}: waited for "
            f"{what} ({error})"
        ) from None
    exchanges = [(other_what, number) for other_what, number, _ in messages]
    if len(set(exchanges)) > 1:
        raise ExchangeMismatchError(exchanges)
    return [other_value for _, _, other_value in messages]


def all_gather_or_raise(what: str, work: Callable[[], T]) -> list[T]:
    """Returns what every rank's work returned.

    An error of one rank is raised on all, with `known_to_all_ranks` and `failed_rank` set. With
    several ranks an exception that is none of ours is raised as UnexpectedError, with its cause
    where it happened; with one rank it is raised as it is.
    """
    if world_size() == 1:
        return [work()]
    result: T | None = None
    failure: GrpoError | None = None
    try:
        result = work()
    except GrpoError as error:
        failure = error
    except Exception as error:
        failure = UnexpectedError(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
    results = all_gather(what, (result, failure))
    for failed_rank, (_, error_of_rank) in enumerate(results):
        if error_of_rank is not None:
            raised = failure or error_of_rank
            raised.known_to_all_ranks = True
            raised.failed_rank = failed_rank if failure is None else rank()
            raise raised
    return [result for result, _ in results]  # type: ignore[misc] # only a failure leaves None


def known_to_all(error: Exception) -> bool:
    """Returns whether every rank raises an error, so that all can still do something together.

    They can write a checkpoint, for example.
    """
    if world_size() == 1:
        return True
    return isinstance(error, GrpoError) and error.known_to_all_ranks


def failed_elsewhere(error: Exception) -> bool:
    """Returns whether an error began on another rank, which reports it."""
    return isinstance(error, GrpoError) and error.failed_rank not in (None, rank())


def sum_seconds(num_bytes: int, tries: int = 5) -> float:
    """Returns the seconds in which all ranks sum `num_bytes` of float32.

    It is the largest of the ranks' medians.
    """
    import torch

    values, taken = (
        torch.zeros(num_bytes // 4, device="cuda" if torch.cuda.is_available() else "cpu"),
        [],
    )
    for _ in range(tries + 1):  # the first makes the connections
        torch.distributed.barrier()
        start = time.perf_counter()
        torch.distributed.all_reduce(values)
        if values.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return max(all_gather("the interconnect", sorted(taken[1:])[tries // 2]))


def sequence_parallel_share(size: int) -> tuple[tuple[int, int], bool]:
    """Returns `((part, parts), reports)`: this rank's part of some work, and whether it reports it.

    `size` neighbouring ranks share a part. The first of them reports what came of it.
    """
    return (rank() // size, world_size() // size), rank() % size == 0


def split_across_ranks(what: str, work: Callable[[slice], Sequence[T]]) -> list[T]:
    """Returns the whole of a list of which each rank makes its share.

    `work(share)` returns the items at `share` of the whole.
    """
    parts = all_gather_or_raise(what, lambda: list(work(slice(rank(), None, world_size()))))
    total = sum(map(len, parts))
    return [parts[i % world_size()][i // world_size()] for i in range(total)]


def rank0_first(what: str, work: Callable[[], T]) -> T:
    """Returns the result of `work`, which rank 0 does before the other ranks do it.

    The others then find what rank 0 made (a download, a directory).
    """
    made: list[T] = []
    all_gather_or_raise(what, lambda: made.append(work()) if rank() == 0 else None)
    return made[0] if made else work()
