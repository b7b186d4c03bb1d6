"""Pools of real vLLM servers on tiny models."""

from real_engines import PROMPTS
from tiny_models import Weights, tiny_config

from grpo import config as configs
from grpo.engines import Request, SamplingOptions
from grpo.engines.servers.pool import PoolCallbacks, ServerPool
from grpo.engines.vllm_options import ServedModel
from grpo.learning import models

REQUESTS = [Request(prompt_ids=prompt, seed=100 * i, n=3) for i, prompt in enumerate(PROMPTS * 3)]
OPTIONS = SamplingOptions(max_tokens=24, ignore_eos=True)


def engine_settings(**servers):
    """Returns the engine's config with two servers. `servers` overrides keys of engine.servers."""
    servers = {"count": 2, **servers}
    return configs.EngineSettings(
        kv_cache_gb=0.05, max_sequences=32, timeout_s=100, servers=configs.ServerSettings(**servers)
    )


def model_weights(model_dir, scale=1.0):
    """Returns a model's weights multiplied by `scale`, in the form that a sync takes."""
    model = models.load_model(model_dir, "eager")
    return Weights(
        {name: scale * parameter.detach() for name, parameter in model.named_parameters()}
    )


def start_pool(model_dir, run_dir, messages=None, **servers):
    """Starts a pool of servers on a model.

    Args:
        model_dir: Directory of the model.
        run_dir: Directory for the files of the pool.
        messages: List to which the pool's messages are appended.
        servers: Keys of engine.servers, see `engine_settings`.
    """
    if messages is None:
        messages = []
    tokenizer = models.load_tokenizer(model_dir)
    return ServerPool(
        model=ServedModel(model_dir=str(model_dir), dtype="float32", max_model_len=160),
        settings=engine_settings(**servers),
        run_dir=run_dir,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        callbacks=PoolCallbacks(say=messages.append),
    )


def pool_run_config(run_dir, model_dir, **sections):
    """Returns the config of a short training run that samples with a pool of two servers.

    Args:
        run_dir: The run directory.
        model_dir: Directory of the model.
        sections: Sections that replace those of this config.
    """
    base = {
        "train": {"rollouts": 4, "problems": 4, "group_size": 4},
        "rewards": {"digits:share": 1.0},
        "eval": {"every": 2, "problems": 4},
        "engine": {"servers": {"count": 2}, "timeout_s": 100},
    }
    return tiny_config(run_dir, model_dir, **(base | sections))
