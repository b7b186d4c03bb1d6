"""Deterministic mode (`engine.deterministic`): equal bits whatever the engine decodes together."""

import pytest
import torch
from real_engines import ENGINE_SETTINGS, PROMPTS
from tiny_models import tiny_config
from training_samples import random_samples
from whole_runs import read_reproducible_results, run_grpo, write_config

from grpo.engines import Request, SamplingOptions
from grpo.engines.local.engine import VllmEngine
from grpo.engines.vllm_options import ServedModel
from grpo.learning import models
from grpo.learning.batch import micro_batches
from grpo.learning.deepspeed_setup import use_deterministic_operations
from grpo.learning.learner import Learner
from grpo.losses.grpo import loss

pytestmark = pytest.mark.gpu


def learner_config(folder, model_dir):
    return tiny_config(
        folder, model_dir, model={"dtype": "bfloat16"}, learner={"lr": 1e-3, "zero_stage": 1}
    )


def run_config(run_dir, model_dir):
    return tiny_config(
        run_dir,
        model_dir,
        model={"dtype": "bfloat16"},
        learner={"zero_stage": 1},
        train={"rollouts": 2, "problems": 4, "group_size": 4},
        engine={"deterministic": True, "kv_cache_gb": 1},
    )


@pytest.fixture
def deterministic_operations():
    use_deterministic_operations()
    yield
    torch.use_deterministic_algorithms(False)


def test_equal_updates_give_equal_weights(tiny, tmp_path, deterministic_operations):
    weights = []
    for _ in range(2):
        config = learner_config(tmp_path, tiny())
        learner = Learner(models.load_model(tiny(), "packed"), config, loss)
        packed = micro_batches(random_samples(), [1 / 100] * 10, max_tokens=1000, packed=True)
        for _ in range(3):
            learner.update(packed)
        weights.append({name: weight.clone() for name, weight in learner.weights()})
    first, second = weights
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


@pytest.mark.engine
def test_a_completion_does_not_depend_on_the_batch(tiny, tmp_path):
    engine = VllmEngine(
        model=ServedModel(
            model_dir=str(tiny()), dtype="bfloat16", max_model_len=160, load_weights=True
        ),
        settings=ENGINE_SETTINGS.model_copy(update={"deterministic": True, "kv_cache_gb": 1}),
        log_file=tmp_path / "engine.log",
    )
    options = SamplingOptions(max_tokens=32, temperature=1.0, ignore_eos=True)
    requests = [Request(prompt_ids=PROMPTS[i % 4], seed=i) for i in range(24)]
    try:
        together = engine.generate(requests, options)
        for request, (completion,) in zip(requests[:3], together[:3], strict=True):
            ((alone,),) = engine.generate([request], options)
            assert alone.token_ids == completion.token_ids
            assert alone.logprobs == completion.logprobs
    finally:
        engine.close()


@pytest.mark.engine
def test_two_equal_runs_give_equal_bits(tiny, tmp_path):
    results = []
    for name in ("a", "b"):
        config = run_config(tmp_path / name, tiny())
        run_grpo(write_config(tmp_path / f"{name}.yaml", config))
        results.append(read_reproducible_results(tmp_path / name))
    assert results[0] == results[1]
