"""Real vLLM engines on tiny models."""

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

PROMPTS = [tuple(6 + (11 * i + 7 * j) % 90 for j in range(100)) for i in range(4)]
SETTINGS = configs.EngineSettings(kv_cache_gb=0.05, max_sequences=32, timeout_s=60)


def start_engine(
    model_dir, tmp_path, engine_class=VllmEngine, *, dtype="float32", **options
) -> VllmEngine:
    """Returns an engine on a tiny model. `options` are fields of `ServedModel`."""
    model = ServedModel(model_dir=str(model_dir), dtype=dtype, max_model_len=160, **options)
    return engine_class(model=model, settings=SETTINGS, log_file=tmp_path / "engine.log")


def put_together(engine, model_dir, tmp_path, rounds=False):
    """Returns a learner on the model and a check of the two.

    The learner is in float32; with `rounds` the engine is not.
    """
    learner = Learner(models.load_model(model_dir, "eager"), tiny_config(tmp_path, model_dir), loss)
    settings = CheckSettings(
        temperature=1.0,
        num_tokens=8,
        max_gap=MAX_GAP_LOW_PRECISION if rounds else MAX_GAP_FLOAT32,
        micro_batch_tokens=1024,
        rounds=rounds,
    )
    return learner, WeightCheck(engine, learner, probe_prompts(PROMPTS, 4, 96), settings)
