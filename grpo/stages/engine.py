"""The engine of a stage: started in the background, and given a directory's weights.

vLLM itself is imported below, in grpo/engines.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import SampledConfig
from grpo.learning import models, moe
from grpo.run import ranks
from grpo.stages.run_context import RunContext

MAX_LOGPROBS = 20  # of one token, unless more are asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """The model that an engine serves, and how much of it is asked for."""

    model_dir: Path
    num_weights: int
    load_weights: bool = False  # False: random weights until the first sync
    max_model_len: int | None = None  # default: the longest sequence of the config
    max_logprobs: int | None = None  # likeliest tokens per position; a child process only


def start_engine(config: SampledConfig, context: RunContext, model: EngineModel) -> Any:
    """Starts the engine in the background and returns it; the run's end closes it.

    The engine is a child process, or the pool of `engine.servers`.

    Raises:
        UserError: The memory does not suffice.
    """
    from grpo.engines.local.engine import VllmEngine, check_memory
    from grpo.engines.servers.pool import PoolCallbacks, ServerPool
    from grpo.engines.vllm_options import ServedModel

    dtype = config.engine.dtype or config.model.dtype
    servers = config.engine.servers
    if model.max_logprobs is not None:
        servers = None
    weight_bytes = model.num_weights * (2 if dtype == "bfloat16" else 4)
    num_engines = servers.count if servers else ranks.local_world_size()
    check_memory(config.engine, weight_bytes, num_engines)
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
        tokenizer = models.load_tokenizer(model.model_dir)
        decode: Any = functools.partial(tokenizer.decode, skip_special_tokens=False)
        engine = ServerPool(
            model=served,
            settings=config.engine,
            run_dir=context.run.path,
            decode=decode,
            callbacks=PoolCallbacks(on_wait=context.signals.check, say=context.display.say),
        )
    else:
        engine = VllmEngine(
            model=served,
            settings=config.engine,
            log_file=context.run.log_file("engine"),
            max_logprobs=model.max_logprobs or MAX_LOGPROBS,
            on_wait=context.signals.check,
        )
    context.stack.callback(engine.close)
    return engine


def send_weights(engine: Any, model_dir: Path) -> float:
    """Sends a directory's weights to an engine that is up, or starting.

    Returns the seconds of the sync.
    """
    import torch

    model: Any = models.load_model(model_dir, "eager")
    engine.wait_ready()
    if torch.cuda.is_available():
        model = model.cuda()
    return float(engine.load_weights(ModelWeights(model), 1).seconds)


class ModelWeights:
    """The weights of a model without a learner (a `grpo.engines.Weights`)."""

    def __init__(self, model: Any) -> None:
        """`model`: a transformers model."""
        self._model = model

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yields `(name, tensor)` for every weight and every buffer that a checkpoint has."""
        saved_names = self._model.state_dict().keys()
        buffers = (
            (name, buffer) for name, buffer in self._model.named_buffers() if name in saved_names
        )
        for name, weight in itertools.chain(self._model.named_parameters(), buffers):
            yield from moe.hub_weights(self._model, name, weight.data)

    def layout(self) -> list[tuple[str, Any, tuple[int, ...]]]:
        """Returns the name, dtype and shape of every weight."""
        return [(name, weight.dtype, tuple(weight.shape)) for name, weight in self]
