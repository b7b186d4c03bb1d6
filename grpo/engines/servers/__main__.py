"""Starts one vLLM server for `engine.servers.urls`. launch/server.sh runs this module.

    python -m grpo.engines.servers CONFIG PORT [key=value ...]

The server uses the GPUs that are visible on this node and listens on all network interfaces. It
accepts only requests with the token in `GRPO_ENGINE_TOKEN`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from grpo import config as configs
from grpo.engines.determinism import require_batch_invariant_kernels
from grpo.engines.servers.command_line import COMMAND, base_environment, server_arguments
from grpo.engines.servers.guard import TOKEN_VARIABLE
from grpo.engines.transfer.choose import choose_sender
from grpo.engines.vllm_options import ServedModel
from grpo.learning import models
from grpo.types import UserError


def main(config_file: str, port: str, overrides: list[str]) -> None:
    """Replaces this process with a server for the model of a config with a section `engine`.

    Raises:
        UserError: The config is invalid, or the token is not set.
    """
    config = _load_config(config_file, overrides)
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise UserError(
            f"{TOKEN_VARIABLE} is not set: set it to the secret of all servers. The trainer reads "
            "the same secret from the variable that engine.servers.token_env names"
        )
    if config.engine.deterministic:
        require_batch_invariant_kernels()
    # A config without the section is read as one with `urls`, which affects the choice of the
    # transport. Only the trainer uses the address itself.
    servers = config.engine.servers or configs.ServerSettings(urls=["here"])
    model_dir = models.locate(
        config.model, Path(tempfile.mkdtemp(prefix="grpo-server-")), config.seed
    )
    model = ServedModel(
        model_dir=str(model_dir),
        dtype=config.engine.dtype or config.model.dtype,
        max_model_len=config.max_sequence_tokens,
        float32_head=config.model.float32_head,
    )
    backend = choose_sender(servers).backend
    arguments = server_arguments(model, config.engine, servers.tensor_parallel, backend)
    environment = base_environment(config.engine, servers.tensor_parallel)
    environment[TOKEN_VARIABLE] = token
    command = [*COMMAND, *arguments, "--host", "0.0.0.0", "--port", port]
    os.execve(sys.executable, command, environment)


def _load_config(config_file: str, overrides: list[str]) -> configs.SamplingStageConfig:
    """Returns the config of `grpo train`, or of another command that its sections identify."""
    tree = configs.apply_overrides(configs.read_yaml(config_file), overrides)
    kind: type[configs.SamplingStageConfig] = configs.TrainConfig
    if "way" in tree:
        kind = configs.DistillConfig
    elif "collect" in tree:
        kind = configs.CollectConfig
    elif "sets" in tree:
        kind = configs.EvalConfig
    return configs.parse(tree, config_file, kind)


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
    except UserError as error:
        print(f"grpo: {error}", file=sys.stderr)
        sys.exit(2)
