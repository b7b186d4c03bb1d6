"""Starts the engine of a stage, and sends it the weights of a model directory.

This module does not import vLLM; grpo/engines does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.config import SamplingStageConfig
from grpo.learning import models, moe
from grpo.run import ranks
from grpo.stages.run_context import RunContext

if TYPE_CHECKING:
    from grpo.engines.vllm_options import ServedModel

DEFAULT_MAX_LOGPROBS = 20  # per token


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """The model that an engine serves.

    Attributes:
        model_dir: Directory with the model's config and weights.
        num_weights: Number of parameters.
        load_weights: Load the weights of the directory. If False, the engine starts with random
            weights and needs a sync before it samples.
        max_model_len: Longest sequence in tokens. Default: the longest sequence of the config.
        max_logprobs: Largest number of logprobs that can be requested per position. If it is set,
            the engine is a child process, even if the config has `engine.servers`.
    """

    model_dir: Path
    num_weights: int
    load_weights: bool = False
    max_model_len: int | None = None
    max_logprobs: int | None = None


def start_engine(config: SamplingStageConfig, context: RunContext, model: EngineModel) -> Any:
    """Starts an engine in the background and returns it. It is closed at the end of the run.

    The engine is a child process, or with `engine.servers` a pool of servers.

    Raises:
        UserError: The machine has too little memory, or no kernels for `engine.deterministic` or
            for a quantized model.
    """
    from grpo.engines.determinism import require_batch_invariant_kernels
    from grpo.engines.local.engine import VllmEngine, check_memory
    from grpo.engines.vllm_options import ServedModel
    from grpo.metrics.cpu import require_kernels

    if config.engine.deterministic:
        require_batch_invariant_kernels()
    dtype = config.engine.dtype or config.model.dtype
    bytes_per_weight = 2 if dtype == "bfloat16" else 4
    # Only the child process implements `top_logprobs`.
    servers = config.engine.servers if model.max_logprobs is None else None
    num_engines = servers.count if servers else ranks.local_world_size()
    check_memory(config.engine, model.num_weights * bytes_per_weight, num_engines)
    context.display.phase(0, "starting the engine")
    served = ServedModel(
        model_dir=str(model.model_dir),
        dtype=dtype,
        max_model_len=model.max_model_len or config.max_sequence_tokens,
        load_weights=model.load_weights,
        float32_head=config.model.float32_head,
    )
    engine: Any
    if servers:
        engine = _start_server_pool(config, context, served)
    else:
        require_kernels(models.weight_bits(model.model_dir), context.display.warn)
        engine = VllmEngine(
            model=served,
            settings=config.engine,
            log_file=context.run.log_file("engine"),
            max_logprobs=model.max_logprobs or DEFAULT_MAX_LOGPROBS,
            on_wait=context.signals.raise_if_received,
        )
    context.stack.callback(engine.close)
    return engine


def _start_server_pool(
    config: SamplingStageConfig, context: RunContext, served: ServedModel
) -> Any:
    from grpo.engines.servers.pool import PoolCallbacks, ServerPool

    tokenizer = models.load_tokenizer(Path(served.model_dir))
    decode: Any = functools.partial(tokenizer.decode, skip_special_tokens=False)
    return ServerPool(
        model=served,
        settings=config.engine,
        run_dir=context.run.path,
        decode=decode,
        callbacks=PoolCallbacks(on_wait=context.signals.raise_if_received, say=context.display.say),
    )


def send_weights(engine: Any, model_dir: Path) -> float:
    """Sends the weights of a model directory to an engine, which may still be starting.

    Returns:
        The duration of the sync in seconds.
    """
    import torch

    model: Any = models.load_model(model_dir, "eager")
    engine.wait_ready()
    if torch.cuda.is_available():
        model = model.cuda()
    first_version = 1
    report = engine.load_weights(ModelWeights(model), first_version)
    return float(report.seconds)


class ModelWeights:
    """The weights of a model that has no learner. Implements `grpo.engines.Weights`."""

    def __init__(self, model: Any) -> None:
        """`model`: a transformers model."""
        self._model = model

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yields `(name, tensor)` for every parameter and every persistent buffer."""
        for name, weight in self._model.named_parameters():
            yield from moe.hub_weights(self._model, name, weight.data)
        persistent_names = self._model.state_dict().keys()
        for name, buffer in self._model.named_buffers():
            if name in persistent_names:
                yield from moe.hub_weights(self._model, name, buffer.data)

    def layout(self) -> list[tuple[str, Any, tuple[int, ...]]]:
        """Returns the name, dtype and shape of every tensor, in the order of iteration."""
        return [(name, weight.dtype, tuple(weight.shape)) for name, weight in self]
