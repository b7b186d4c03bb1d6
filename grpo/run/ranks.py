"""The learner's ranks: identity of this process, exchange of Python values, and shared work.

An exchange is one call of `all_gather`. All ranks make the same exchanges in the same order. A
process without a launcher is a group of one, whose exchanges need no torch.

All ranks have all samples of a rollout (`split_across_ranks`), so they make the same decisions
about it. DeepSpeed shards optimizer states (ZeRO 1), gradients (2) and weights (3).
"""

from __future__ import annotations

import atexit
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from grpo.run.addresses import free_port, use_loopback
from grpo.types import GrpoError, RunError, UserError, first_line

T = TypeVar("T")
_gloo_group: Any = None  # for Python values, which are sent over the CPU also on GPU machines
_timeout = timedelta(minutes=30)
_num_exchanges = 0  # exchanges so far


class BrokenCollectiveError(RunError):
    """A rank failed inside a collective and cannot notify the others; it ends, and the job ends."""


class UnexpectedError(RunError):
    """An exception that is not a GrpoError, as text, so that it can be sent to every rank."""


class CollectiveMismatchError(RunError):
    """The ranks are in different exchanges: they run different programs or configs.

    All ranks raise it. They cannot write a checkpoint together afterwards, because they may not
    have made the same number of rollouts.

    Attributes:
        exchanges: The name and the number of the exchange of each rank:
            `[("the groups", 3), ("the end", 3)]`.
    """

    def __init__(self, exchanges: Sequence[tuple[str, int]]) -> None:
        """Args: `exchanges`: the attribute of the same name."""
        super().__init__(exchanges)
        self.exchanges = list(exchanges)

    def __str__(self) -> str:
        """Returns a message with the exchange of each rank."""
        positions = "; ".join(
            f"rank {rank_number}: {name!r}, exchange {number}"
            for rank_number, (name, number) in enumerate(self.exchanges)
        )
        return f"the ranks are in different exchanges: {positions}"


def rank() -> int:
    """Returns the rank of this process among all ranks, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Returns the number of ranks on all machines, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Returns the rank of this process among those of this machine, 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Returns the number of ranks on this machine."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun's, deepspeed's
        value = os.environ.get(name)
        if value:
            return int(value)
    return world_size()


def adopt_slurm_variables() -> None:
    """Sets torch's process group variables from those of Slurm's `srun`.

    Does nothing without `srun`, or if another launcher (torchrun, deepspeed) has set them.
    """
    environment = os.environ
    if "RANK" in environment:
        return
    # Slurm also sets its variables in a batch script, but that is a step with a single task.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]],
        capture_output=True,
        text=True,
        check=True,
    )
    # "4", "4(x2)" for two nodes with 4 tasks, "4,3" for nodes with 4 and 3
    tasks_per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    tasks_on_first_node = tasks_per_node.partition("(")[0].partition(",")[0]
    environment.update(
        {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": tasks_on_first_node,
            "MASTER_ADDR": hosts.stdout.split()[0],
            "MASTER_PORT": str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000),
        }
    )


def num_cores() -> int:
    """Returns the number of CPU cores that this process may use, e.g. its share under Slurm."""
    return len(os.sched_getaffinity(0))


def join_process_group(timeout_s: float = 1800.0) -> None:
    """Joins the process group, which is a group of one without a launcher.

    Makes the GPU of this local rank the current one. Without a GPU, it divides the CPU cores among
    the local ranks; a single rank keeps OMP_NUM_THREADS.

    If this process is in the group already, because of an earlier run, only the variables of the
    environment and the number of threads are set again.

    Args:
        timeout_s: The maximum time in seconds to wait for another rank, now and in exchanges.

    Raises:
        UserError: There are more ranks than GPUs on this machine.
        RunError: The group cannot be formed.
    """
    global _gloo_group, _timeout
    import torch

    if world_size() == 1:
        _set_group_of_one()
    if _is_on_one_machine():
        use_loopback()
    has_gpu = torch.cuda.is_available()
    is_single_thread_default = world_size() > 1  # torchrun sets OMP_NUM_THREADS to 1
    if not has_gpu and ("OMP_NUM_THREADS" not in os.environ or is_single_thread_default):
        torch.set_num_threads(max(1, num_cores() // local_world_size()))
    if torch.distributed.is_initialized():
        return
    _timeout = timedelta(seconds=timeout_s)
    if has_gpu:
        _take_gpu()
    try:
        backend = "nccl" if has_gpu else "gloo"
        torch.distributed.init_process_group(backend, timeout=_timeout)
        if world_size() > 1:
            _gloo_group = torch.distributed.new_group(backend="gloo", timeout=_timeout)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"rank {rank()} of {world_size()}: no process group at "
            f"{os.environ.get('MASTER_ADDR')}: {first_line(error)}"
        ) from None
    atexit.register(_end_gloo_groups)


def _is_on_one_machine() -> bool:
    """Returns whether all ranks are known to be on this machine."""
    if world_size() == 1:
        return True
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def _take_gpu() -> None:
    """Makes the GPU of this local rank the current one. Raises UserError if there is none."""
    import torch

    num_gpus = torch.cuda.device_count()
    if local_world_size() > num_gpus:
        raise UserError(
            f"{local_world_size()} ranks on this machine, but it has {num_gpus} GPUs: start one "
            "rank per GPU"
        )
    torch.cuda.set_device(local_rank())


def _end_gloo_groups() -> None:
    """Ends the threads of gloo before the interpreter ends.

    A thread that frees a tensor after the end of the interpreter aborts the process, so a
    successful run would end with SIGABRT (pytorch/pytorch#179291). Only `_gloo_group` can still
    have a busy thread, because it runs the last exchange of a run. DeepSpeed's own gloo groups are
    idle by then. An NCCL group ends with the process: destroying it requires all ranks, and one of
    them may have failed.
    """
    global _gloo_group
    from torch import distributed

    if not distributed.is_initialized():
        return
    group = _gloo_group
    _gloo_group = None
    if distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
    elif group is not None:
        distributed.destroy_process_group(group)


def _set_group_of_one() -> None:
    """Sets the variables that a launcher would set for a single rank, unless they are set."""
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
    """Raises UserError on all ranks if their fingerprints differ; the message names which.

    Args:
        fingerprints: The fingerprints of this rank's inputs by name:
            `{"config": "9f86d081884c7d65"}`.
    """
    fingerprints_of_ranks = all_gather("the fingerprints", dict(fingerprints))
    # The names of all ranks, so that either all ranks raise or none does.
    names = sorted(set().union(*fingerprints_of_ranks))
    differing_names = []
    details = []
    for name in names:
        values = [of_rank.get(name) for of_rank in fingerprints_of_ranks]
        if len(set(values)) > 1:
            differing_names.append(name)
            listed = ", ".join(f"rank {number} {value}" for number, value in enumerate(values))
            details.append(f"{name}: {listed}")
    if not differing_names:
        return
    error = UserError(
        f"the ranks do not start from the same {' and '.join(differing_names)} "
        f"({'; '.join(details)}): give all nodes the same files"
    )
    error.raised_on_all_ranks = True
    raise error


def all_gather(name: str, value: T) -> list[T]:
    """Returns the values of all ranks, in order of ranks.

    Args:
        name: The name of the exchange, for error messages: "the fingerprints".
        value: The value of this rank. It must support pickling.

    Raises:
        RunError: A rank is lost, or did not arrive in time.
        CollectiveMismatchError: The ranks are in different exchanges. All ranks raise it.
    """
    global _num_exchanges
    if world_size() == 1:
        return [value]
    import torch

    _num_exchanges += 1
    message = (name, _num_exchanges, value)
    messages: list[Any] = [None] * world_size()
    try:
        torch.distributed.monitored_barrier(_gloo_group, timeout=_timeout, wait_all_ranks=True)
        torch.distributed.all_gather_object(messages, message, group=_gloo_group)
    except RuntimeError as error:
        raise RunError(
            f"rank {rank()}: another rank is lost, or did not arrive within {_timeout}: waited for "
            f"{name} ({error})"
        ) from None
    exchanges = [(exchange_name, number) for exchange_name, number, _ in messages]
    if len(set(exchanges)) > 1:
        raise CollectiveMismatchError(exchanges)
    return [rank_value for _, _, rank_value in messages]


def all_gather_or_raise(name: str, work: Callable[[], T]) -> list[T]:
    """Runs `work` on all ranks and returns the results, in order of ranks.

    If `work` raises on one rank, all ranks raise its error, with `raised_on_all_ranks` and
    `failed_rank` set. With several ranks, an exception that is not a GrpoError becomes an
    UnexpectedError, whose cause is set on the rank where it was raised.

    Args:
        name: The name of the exchange, for error messages.
        work: A function without arguments. It must not make exchanges that other ranks do not make.
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
    outcomes = all_gather(name, (result, failure))
    # A rank that has failed raises its own error, the others that of the first failed rank.
    if failure is not None:
        raise _mark_known_to_all(failure, failed_rank=rank())
    for number, (_, rank_failure) in enumerate(outcomes):
        if rank_failure is not None:
            raise _mark_known_to_all(rank_failure, failed_rank=number)
    return [rank_result for rank_result, _ in outcomes]  # type: ignore[misc] # None only on failure


def _mark_known_to_all(error: GrpoError, failed_rank: int) -> GrpoError:
    error.raised_on_all_ranks = True
    error.failed_rank = failed_rank
    return error


def is_raised_on_all_ranks(error: Exception) -> bool:
    """Returns whether all ranks raise an error, so that they can still write a checkpoint."""
    if world_size() == 1:
        return True
    return isinstance(error, GrpoError) and error.raised_on_all_ranks


def failed_on_another_rank(error: Exception) -> bool:
    """Returns whether an error was first raised on another rank, which then reports it."""
    return isinstance(error, GrpoError) and error.failed_rank not in (None, rank())


def measure_all_reduce_s(num_bytes: int, tries: int = 5) -> float:
    """Returns the seconds that an all-reduce of `num_bytes` of float32 takes.

    It is the median over `tries`, on the rank where that is largest.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.zeros(num_bytes // 4, device=device)
    durations_s = []
    for _ in range(tries + 1):
        torch.distributed.barrier()
        start = time.perf_counter()
        torch.distributed.all_reduce(values)
        if values.is_cuda:
            torch.cuda.synchronize()
        durations_s.append(time.perf_counter() - start)
    # The first all-reduce does not count: it opens the connections.
    median_s = statistics.median_high(durations_s[1:])
    return max(all_gather("the interconnect", median_s))


class SequenceParallelShare(NamedTuple):
    """The data-parallel position of a rank under sequence parallelism.

    Rank 1 of 4 with `learner.sequence_parallel: 2` has
    `SequenceParallelShare(share=(0, 2), is_reporter=False)`.
    """

    share: tuple[int, int]  # (data-parallel rank, data-parallel size)
    is_reporter: bool  # True on the first rank of each sequence-parallel group


def sequence_parallel_share(size: int) -> SequenceParallelShare:
    """Returns this rank's data-parallel position if `size` neighboring ranks share a sequence."""
    return SequenceParallelShare(
        share=(rank() // size, world_size() // size), is_reporter=rank() % size == 0
    )


def split_across_ranks(name: str, work: Callable[[slice], Sequence[T]]) -> list[T]:
    """Returns, on every rank, the complete list of which each rank computes a share.

    Args:
        name: The name of the exchange, for error messages.
        work: Called with this rank's share, the slice `slice(rank, None, world_size)` of the list;
            returns the items at these positions.
    """
    share = slice(rank(), None, world_size())
    parts = all_gather_or_raise(name, lambda: list(work(share)))
    total = sum(len(part) for part in parts)
    # Item i was computed by rank i % n, as its item i // n.
    return [parts[i % world_size()][i // world_size()] for i in range(total)]


def rank0_first(name: str, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0, then on the other ranks, and returns this rank's result.

    The other ranks use files that rank 0 has created, e.g. a download. An error of rank 0 is raised
    on all ranks; an error of another rank is raised there only.

    Args:
        name: The name of the exchange, for error messages.
        work: A function without arguments.
    """
    results: list[T] = []

    def run_on_rank0() -> None:
        if rank() == 0:
            results.append(work())

    all_gather_or_raise(name, run_on_rank0)
    if results:
        return results[0]
    return work()
