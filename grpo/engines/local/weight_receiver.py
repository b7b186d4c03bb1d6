"""The child process as a `WeightReceiver` (transfer/interface.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grpo.engines import WrongWeightVersionError


class ChildReceiver:
    """Forwards a sender's calls to the child, for one weight version."""

    def __init__(self, call: Callable[[str, dict[str, Any]], Any], version: int) -> None:
        """Prepares an update.

        Args:
            call: `call(method, arguments)` returns the child's result or raises EngineError.
            version: the version of the weights.
        """
        self._call = call
        self._version = version

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connects the child to the transport."""
        self._call("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Begins an update."""
        self._call("start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        """Loads weights in the child."""
        self._call("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Ends the update. Raises EngineError unless the child acknowledges the version.

        `weight_version`, which vLLM's senders leave at None, is not used.
        """
        acknowledged = self._call("finish_weight_update", {"weight_version": str(self._version)})
        if acknowledged != self._version:
            raise WrongWeightVersionError("the engine", acknowledged, self._version)

    def load_stored_weights(self, update_info: dict[str, Any]) -> None:
        """Runs a complete update from stored weights."""
        self.start_weight_update()
        self.update_weights(update_info)
        self.finish_weight_update()
