"""Transport `nccl`: an NCCL broadcast to servers on other GPUs, with vLLM's transfer engine.

The learner's rank 0 and the workers of all servers form one NCCL group, in which the learner is
rank 0.
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
from grpo.run.addresses import free_port, local_address_for

LEAVE_LIMIT_S = 20.0  # the longest wait for the thread of a failed send after its group is aborted


@runtime_checkable
class EngineGroup(WeightReceiver, Protocol):
    """A group of servers that receive weights together.

    Attributes:
        version: the version of the weights that are sent.
        num_workers: the number of GPUs per server.
    """

    version: int
    num_workers: int

    def members(self) -> list[tuple[str, int]]:
        """Returns `(URL, number of starts)` of each server that is up.

        A server that was restarted has another number of starts and is therefore a new member.
        Raises EngineError if no server is up.
        """

    def end_failed_update(self) -> None:
        """Ends an update that failed. Removes servers whose engines do not answer."""


class NcclSender:
    """Sends weights to all servers that are up.

    The NCCL group is formed by the first send, and formed again if the servers have changed.
    """

    backend: ClassVar[str] = "grpo_nccl"
    keeps_weights: ClassVar[bool] = False

    def __init__(self, options: SenderOptions) -> None:
        """Stores the options. The group is formed by the first send."""
        self.buffer_bytes = 0
        self._options = options
        self._trainer: Any = None  # vLLM's sender, a member of the current NCCL group
        self._members: list[tuple[str, int]] = []  # of the current NCCL group
        self._is_stuck = False  # the thread of a failed send still iterates the weights

    def send(self, stream: WeightStream, receiver: WeightReceiver) -> None:
        """Sends every weight. After a failure, tries once more without the servers that were lost.

        A lost server gets weights with the next send after its restart.

        Raises:
            EngineError: the second attempt failed, or a second attempt is not possible.
        """
        if not isinstance(receiver, EngineGroup):
            raise TypeError(f"the transport `nccl` sends to a group of servers, got {receiver!r}")
        members = receiver.members()
        try:
            self._send_once(stream, receiver, members)
        except EngineError as error:
            # Under ZeRO-3 all ranks gather the weights together, and the other ranks iterate them
            # only once.
            if self._is_stuck or ranks.world_size() > 1:
                raise
            self._options.say(f"engine: {error}; trying again without the lost servers")
        else:
            return
        members = receiver.members()
        self._send_once(stream, receiver, members)

    def close(self) -> None:
        """Does nothing: the NCCL group ends with its processes."""

    def _send_once(
        self, stream: WeightStream, group: EngineGroup, members: list[tuple[str, int]]
    ) -> None:
        """Sends every weight to the members. Ends the update and raises EngineError on failure."""
        try:
            self._send_in_thread(stream, group, members)
        except EngineError:
            group.end_failed_update()
            raise

    def _send_in_thread(
        self, stream: WeightStream, group: EngineGroup, members: list[tuple[str, int]]
    ) -> None:
        """Sends in a thread, because NCCL blocks if a member is lost. Raises EngineError."""
        receiver = _FailFastReceiver(group)

        def send_weights() -> None:
            try:
                self._form_group(members, group.num_workers, receiver, stream)
                receiver.raise_failure()
                self._trainer.client = receiver
                self._trainer.source = stream
                self._trainer.send_weights()
            except BaseException as error:
                receiver.record_failure(error)

        thread = threading.Thread(target=send_weights, daemon=True)
        thread.start()
        try:
            self._wait(thread, receiver)
        except BaseException as error:  # raised by `on_wait`
            receiver.record_failure(error)
            raise
        finally:
            if receiver.failure is not None:
                self._leave_group()
                thread.join(LEAVE_LIMIT_S)
                self._is_stuck = thread.is_alive()
        if receiver.failure is not None:
            raise EngineError(
                f"sending weights {group.version} to {len(members)} servers by NCCL failed: "
                f"{receiver.failure}"
            )

    def _wait(self, thread: threading.Thread, receiver: _FailFastReceiver) -> None:
        """Waits until the thread ends, a failure is recorded or the time limit is reached."""
        limit_s = self._options.limit_s
        deadline = time.monotonic() + limit_s
        while thread.is_alive() and receiver.failure is None:
            if time.monotonic() > deadline:
                timeout = EngineTimeoutError(
                    "the transfer did not finish", limit_s, "see engine.servers.sync_timeout_s"
                )
                receiver.record_failure(timeout)
                return
            thread.join(0.2)
            self._options.on_wait()

    def _form_group(
        self,
        members: list[tuple[str, int]],
        num_workers: int,
        receiver: _FailFastReceiver,
        stream: WeightStream,
    ) -> None:
        """Forms an NCCL group with the members, unless the current group has the same members."""
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )

        if members == self._members:
            return
        self._leave_group()
        first_url, _ = members[0]
        init_info = NCCLTrainerInitInfo(
            rank=0,
            master_address=local_address_for(first_url),
            master_port=free_port(),
            world_size=1 + len(members) * num_workers,
        )
        source: Any = stream  # `WeightStream` does not inherit from vLLM's `WeightSource`
        self._trainer = NCCLTrainerWeightTransferEngine.trainer_init(
            init_info, client=receiver, source=source
        )
        self._members = members

    def _leave_group(self) -> None:
        """Aborts the NCCL group. A call that waits in it for a lost member then returns."""
        self._members = []
        if self._trainer is not None:
            self._trainer.shutdown()
            self._trainer = None


class _FailFastReceiver:
    """Forwards vLLM's calls to a receiver, records the first failure and rejects further calls.

    vLLM reads the result of `update_weights` after its broadcast, and the broadcast waits for the
    lost server. The failure must therefore be visible before the call returns to vLLM.
    """

    def __init__(self, receiver: WeightReceiver) -> None:
        self._receiver = receiver
        self._failures: list[BaseException] = []

    @property
    def failure(self) -> BaseException | None:
        """The first failure of the send, None if there is none."""
        return self._failures[0] if self._failures else None

    def record_failure(self, error: BaseException) -> None:
        self._failures.append(error)

    def raise_failure(self) -> None:
        """Raises EngineError if the send has failed."""
        if self.failure is not None:
            raise EngineError(f"the transfer was aborted: {self.failure}")

    def _call(self, method: Callable[..., None], *arguments: Any) -> None:
        self.raise_failure()
        try:
            method(*arguments)
        except BaseException as error:
            self.record_failure(error)
            raise

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call(self._receiver.init_weight_transfer_engine, init_info)

    def start_weight_update(self) -> None:
        self._call(self._receiver.start_weight_update)

    def update_weights(self, update_info: Any) -> None:
        self._call(self._receiver.update_weights, update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call(self._receiver.finish_weight_update)
