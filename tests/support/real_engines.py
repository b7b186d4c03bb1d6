"""Real vLLM engines on tiny models."""

from tiny_models import tiny_config

from grpo import config as configs
from grpo.engines.local.engine import VllmEngine
from grpo.learning import models
from grpo.learning.learner import Learner
from grpo.losses.grpo import loss
from grpo.training.weight_sync import MAX_GAP, Probe, probe_prompts

PROMPTS = [tuple(6 + (11 * i + 7 * j) % 90 for j in range(100)) for i in range(4)]
SETTINGS = configs.Engine(kv_cache_gb=0.05, max_sequences=32, timeout_s=60)


def start_engine(model_dir, tmp_path, dtype="float32", **options) -> VllmEngine:
    return VllmEngine(
        model_dir=str(model_dir),
        settings=SETTINGS,
        dtype=dtype,
        max_model_len=160,
        log_file=tmp_path / "engine.log",
        **options,
    )


def put_together(engine, model_dir, tmp_path):
    """Returns a learner on the model and a probe between the two, in float32."""
    learner = Learner(models.load_model(model_dir, "eager"), tiny_config(tmp_path, model_dir), loss)
    probe = Probe(
        engine,
        learner,
        probe_prompts(PROMPTS, 4, 96),
        temperature=1.0,
        tokens=8,
        max_gap=MAX_GAP[True],
        micro_batch_tokens=1024,
    )
    return learner, probe
