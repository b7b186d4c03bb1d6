"""Real vLLM engines on tiny models."""

import torch
from tiny_models import tiny_config

from grpo import config as configs
from grpo.engines.local.engine import VllmEngine
from grpo.engines.vllm_options import ServedModel
from grpo.learning import models
from grpo.learning.learner import Learner
from grpo.losses.grpo import loss
from grpo.training.weight_sync import (
    MAX_GAP_FLOAT32,
    MAX_GAP_LOW_PRECISION,
    CheckSettings,
    WeightCheck,
    probe_prompts,
)

# Four prompts of 100 token ids, longer than several KV blocks.
PROMPTS = [tuple(6 + (11 * i + 7 * j) % 90 for j in range(100)) for i in range(4)]
FULL_BATCH = 12  # sequences in a full batch of the weight check
ENGINE_SETTINGS = configs.EngineSettings(
    kv_cache_gb=None if torch.cuda.is_available() else 0.05, max_sequences=32, timeout_s=60
)


def start_engine(
    model_dir, tmp_path, engine_class=VllmEngine, *, dtype="float32", **options
) -> VllmEngine:
    """Starts an engine on a model. Its log is `tmp_path/engine.log`.

    Args:
        model_dir: Directory of the model.
        tmp_path: Existing directory for the log.
        engine_class: VllmEngine, or a subclass with another child process.
        dtype: Data type of the engine's weights.
        options: Further fields of ServedModel.
    """
    model = ServedModel(model_dir=str(model_dir), dtype=dtype, max_model_len=160, **options)
    return engine_class(model=model, settings=ENGINE_SETTINGS, log_file=tmp_path / "engine.log")


def make_learner_and_weight_check(engine, model_dir, tmp_path, is_low_precision=False):
    """Returns a float32 learner on a model, and the check of its weights in the engine.

    Args:
        engine: The engine that the check compares with the learner.
        model_dir: Directory of the model.
        tmp_path: Run directory in the learner's config.
        is_low_precision: Whether the engine computes in less than float32. The check then allows a
            larger gap.

    Returns:
        A tuple `(learner, weight_check)`.
    """
    learner = Learner(models.load_model(model_dir, "eager"), tiny_config(tmp_path, model_dir), loss)
    settings = CheckSettings(
        temperature=1.0,
        num_tokens=8,
        max_gap=MAX_GAP_LOW_PRECISION if is_low_precision else MAX_GAP_FLOAT32,
        max_gap_ratio=5.0,
        has_cuda_graphs=True,
        full_batch_size=FULL_BATCH,
        micro_batch_tokens=1024,
        is_low_precision=is_low_precision,
    )
    return learner, WeightCheck(engine, learner, probe_prompts(PROMPTS, 4, 96), settings)
