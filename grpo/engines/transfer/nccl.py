"""Transport `nccl`: a broadcast to servers on other GPUs, by vLLM's own engine.

The learner's rank 0 and the workers of every server form one NCCL group.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

from grpo.engines import EngineError, EngineTimeoutError
from grpo.engines.transfer.checksums import WeightStream
from grpo.engines.transfer.interface import SenderOptions, WeightReceiver
from grpo.run import ranks
from grpo.run.addresses import address_towards, free_port

LEAVE_LIMIT_S = 20.0  # the longest wait for a failed send to notice that its group is gone


@runtime_checkable
class EngineGroup(WeightReceiver, Protocol):
    """Several servers that receive weights together."""

    version: int  # of the weights that are sent
    num_workers: int  # GPUs per server

    def members(self) -> list[tuple[str, int]]:
        """Returns, per server that is up, its URL and how often it was started.

        A server that was started again is another member. Raises EngineError if none is up.
        """

    def end_failed_update(self) -> None:
        """Ends an update that failed; drops members whose engines do not answer."""


class NcclSender:
    """Sends to the servers that are up.

    The group is formed again when its members are no longer the processes that are up.
    """

    backend: ClassVar[str] = "grpo_nccl"
    keeps_weights: ClassVar[bool] = False

    def __init__(self, options: SenderOptions) -> None:
        """Forms no group yet: it is formed at the first send."""
        self.buffer_bytes = 0
        self._options = options
        self._trainer: Any = None
        self._members: list[tuple[str, int]] = []
        self._is_stuck = False  # a send that was given up still iterates the weights

    def send(self, stream: WeightStream, receiver: WeightReceiver) -> None:
        """Sends every weight; tries once more without the servers that are lost on the way.

        A lost server gets weights with the next send. Raises EngineError.
        """
        if not isinstance(receiver, EngineGroup):
            raise TypeError(f"the transport `nccl` sends to a group of servers, got {receiver!r}")
        members = receiver.members()
        try:
            self._send_once(stream, receiver, members)
        except EngineError as error:
            receiver.end_failed_update()
            # under ZeRO-3 all ranks gather the weights together, once
            if self._is_stuck or ranks.world_size() > 1:
                raise
            self._options.say(f"engine: {error}; once more without those that are lost")
        else:
            return
        members = receiver.members()
        try:
            self._send_once(stream, receiver, members)
        except EngineError:
            receiver.end_failed_update()
            raise

    def close(self) -> None:
        """Does nothing: the group ends with the processes."""

    def _send_once(
        self, stream: WeightStream, group: EngineGroup, members: list[tuple[str, int]]
    ) -> None:
        failures: list[BaseException] = []
        guarded = _FailFastReceiver(group, failures)

        def work() -> None:
            try:
                self._join(members, group.num_workers, guarded, stream)
                guarded.raise_failure()
                self._trainer.client = guarded
                self._trainer.source = stream
                self._trainer.send_weights()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            self._wait(thread, failures)
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            if failures:
                self._leave()
                thread.join(LEAVE_LIMIT_S)
                self._is_stuck = thread.is_alive()
        if failures:
            raise EngineError(
                f"weights {group.version} to {len(members)} servers by NCCL: {failures[0]}"
            )

    def _wait(self, thread: threading.Thread, failures: list[BaseException]) -> None:
        limit_s = self._options.limit_s
        deadline = time.monotonic() + limit_s
        while thread.is_alive() and not failures:
            if time.monotonic() > deadline:
                failures.append(EngineTimeoutError("not done", limit_s))
                return
            thread.join(0.2)
            self._options.on_wait()

    def _join(
        self, members: list[tuple[str, int]], num_workers: int, receiver: Any, stream: Any
    ) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )

        if members == self._members:
            return
        self._leave()
        first_url, _ = members[0]
        init_info = NCCLTrainerInitInfo(
            rank=0,
            master_address=address_towards(first_url),
            master_port=free_port(),
            world_size=1 + len(members) * num_workers,
        )
        self._trainer = NCCLTrainerWeightTransferEngine.trainer_init(
            init_info, client=receiver, source=stream
        )
        self._members = members

    def _leave(self) -> None:
        """Aborts the group: a call that waits in it for a lost member returns."""
        self._members = []
        if self._trainer is not None:
            self._trainer.shutdown()
            self._trainer = None


class _FailFastReceiver:
    """Passes vLLM's calls to a receiver, records the first failure and refuses further calls.

    vLLM asks for the result of `update_weights` after its broadcast, and the broadcast waits for
    the lost server: the failure must be seen before.
    """

    def __init__(self, receiver: WeightReceiver, failures: list[BaseException]) -> None:
        self._receiver = receiver
        self._failures = failures

    def raise_failure(self) -> None:
        """Raises EngineError if the send has failed."""
        if self._failures:
            raise EngineError(f"given up: {self._failures[0]}")

    def _call(self, method: Callable[..., None], *arguments: Any) -> None:
        self.raise_failure()
        try:
            method(*arguments)
        except BaseException as error:
            self._failures.append(error)
            raise

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call(self._receiver.init_weight_transfer_engine, init_info)

    def start_weight_update(self) -> None:
        self._call(self._receiver.start_weight_update)

    def update_weights(self, update_info: Any) -> None:
        self._call(self._receiver.update_weights, update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call(self._receiver.finish_weight_update)
