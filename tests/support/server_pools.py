"""Pools of real vLLM servers on tiny models."""

from real_engines import PROMPTS
from tiny_models import Weights, tiny_config

from grpo import config as configs
from grpo.engines import Request, SamplingOptions
from grpo.engines.servers.pool import PoolCallbacks, ServerPool
from grpo.engines.vllm_options import ServedModel
from grpo.learning import models

REQUESTS = [Request(prompt_ids=p, seed=100 * i, n=3) for i, p in enumerate(PROMPTS * 3)]
OPTIONS = SamplingOptions(max_tokens=24, ignore_eos=True)


def settings(**servers):
    return configs.EngineSettings(
        kv_cache_gb=0.05,
        max_sequences=32,
        timeout_s=100,
        servers=configs.ServerSettings(**({"count": 2} | servers)),
    )


def weights(model_dir, scale=1.0):
    model = models.load_model(model_dir, "eager")
    return Weights(
        {name: scale * parameter.detach() for name, parameter in model.named_parameters()}
    )


def pool_of(model_dir, run_dir, said=None, **servers):
    tokenizer = models.load_tokenizer(model_dir)
    return ServerPool(
        model=ServedModel(model_dir=str(model_dir), dtype="float32", max_model_len=160),
        settings=settings(**servers),
        run_dir=run_dir,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        callbacks=PoolCallbacks(say=(said if said is not None else []).append),
    )


def pooled(folder, model, **sections):
    made = {
        "train": {"rollouts": 4, "problems": 4, "group_size": 4},
        "rewards": {"digits:share": 1.0},
        "eval": {"every": 2, "problems": 4},
        "engine": {"servers": {"count": 2}, "timeout_s": 100},
    }
    return tiny_config(folder, model, **(made | sections))
