"""Tests that need a CUDA device: `launch/test.sh -m gpu`.

tests/benchmarks/gpu_cycle.py measures times and throughput.
"""

import pytest
import torch
from real_engines import make_learner_and_weight_check, start_engine
from tiny_models import tiny_config
from training_samples import grouped_samples, padded_batches, random_samples, values_and_gradients
from whole_runs import read_metrics, run_grpo, write_config

from grpo.learning import models, token_logprobs
from grpo.learning.batch import micro_batches, to_device
from grpo.learning.learner import Learner
from grpo.learning.policy import HeadOptions, Policy
from grpo.learning.token_logprobs import TokenGrads
from grpo.losses.grpo import loss
from grpo.training.weight_sync import MAX_GAP_LOW_PRECISION, sync_weights
from grpo.types import Sample

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def copy_weights(learner):
    return {name: weight.float().cpu() for name, weight in learner.weights()}


def assert_equal_weights(actual, expected):
    assert actual.keys() == expected.keys()
    for name, weight in actual.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_updates_in_bfloat16_match_updates_in_float32(tiny, tmp_path, stage, offload):
    """The gradient norms agree, and a checkpoint restores the weights bit for bit."""
    grad_norms = {}
    for dtype in ("float32", "bfloat16"):
        settings = {"lr": 1e-3, "zero_stage": stage, "offload_optimizer": offload}
        config = tiny_config(tmp_path, tiny(), model={"dtype": dtype}, learner=settings)
        learner = Learner(models.load_model(tiny(), "packed"), config, loss)
        packed = micro_batches(random_samples(), [1 / 100] * 10, max_tokens=1000, packed=True)
        grad_norms[dtype] = [learner.update(packed)["policy/grad_norm"] for _ in range(4)]
        saved = copy_weights(learner)
        learner.save(tmp_path / dtype)
        learner.update(packed)
        learner.load(tmp_path / dtype)
        assert_equal_weights(copy_weights(learner), saved)
    assert grad_norms["bfloat16"] == pytest.approx(grad_norms["float32"], rel=0.05)


def long_samples():
    """Returns two completions, of 8,000 and 3,000 tokens, of a prompt of 100 tokens."""
    generator = torch.Generator().manual_seed(0)

    def random_tokens(count):
        return tuple(torch.randint(10, 200, (count,), generator=generator).tolist())

    prompt = random_tokens(100)
    result = []
    for length in (8000, 3000):
        result.append(
            Sample(
                token_ids=prompt + random_tokens(length),
                prompt_length=100,
                advantages=(1.0,) * length,
            )
        )
    return result


def logprobs_of_long_samples(model_dir, attention, dtype):
    """Returns the logprobs of all completion tokens, in the order of the samples."""
    (batch,) = micro_batches(
        long_samples(), [1.0] * 2, max_tokens=20_000, packed=attention == "packed"
    )
    model = models.load_model(model_dir, attention).to(DEVICE, dtype)
    with torch.no_grad():
        policy = Policy(model, HeadOptions(temperature=1.0, chunk_tokens=512))
        output = policy(to_device(batch, DEVICE))
    logprobs = []
    for row in torch.tensor(batch.sample_indices).argsort().tolist():
        mask = batch.token_mask[row].to(DEVICE)
        logprobs.append(output.logprobs[row][mask])
    return torch.cat(logprobs).float()


@pytest.mark.parametrize("attention", ["packed", "sdpa", "flash_attention_2"])
def test_logprobs_of_8k_tokens_match_eager_attention_in_float32(tiny, attention):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    expected = logprobs_of_long_samples(tiny(), "eager", torch.float32)
    actual = logprobs_of_long_samples(tiny(), attention, torch.bfloat16)
    assert (actual - expected).abs().mean() < 0.05


@pytest.mark.parametrize("kind", ["tiny-qwen2", "tiny-llama", "tiny-qwen3"])
def test_gradients_of_the_packed_stream_match_float32_on_a_cpu(tiny, kind):
    """Covers variable-length attention, the fused norms and the kernels for logprobs."""
    expected_values, expected_gradients = values_and_gradients(
        models.load_model(tiny(kind), "eager"), grouped_samples(), 1000
    )
    model = models.load_model(tiny(kind), "packed").to(DEVICE, torch.bfloat16)
    models.use_fused_norms(model)
    values, gradients = values_and_gradients(model, grouped_samples(), 1000, DEVICE)
    logprob_differences = (values.cpu() - expected_values)[0].abs()
    assert logprob_differences.mean() < 0.03  # 0.011 was measured on an H200
    total_norm = float(torch.nn.utils.get_total_norm(expected_gradients.values()))
    for name, expected in expected_gradients.items():
        error = (gradients[name].float().cpu() - expected).norm()
        assert error < 0.05 * expected.norm() + 0.001 * total_norm, name


def test_logprob_kernels_match_pytorch_operations():
    from grpo.learning import logprob_kernels  # needs Triton

    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = 4 * torch.randn(5, 49_153, device=DEVICE, generator=generator)
    targets = torch.randint(0, 49_153, (5,), device=DEVICE, generator=generator)
    logprob_grads, entropy_grads = torch.randn(2, 5, device=DEVICE, generator=generator)
    expected_values = token_logprobs.compute_values(logits, targets, temperature=0.7)
    actual_values = logprob_kernels.compute_values(logits, targets, temperature=0.7)
    for actual, expected in zip(actual_values, expected_values, strict=True):
        assert torch.allclose(actual, expected, atol=1e-4)
    for optional_entropy_grads in (None, entropy_grads):
        grads = TokenGrads(logprob_grads, optional_entropy_grads)
        arguments = (logits, targets, expected_values, grads)
        actual = logprob_kernels.compute_gradient(*arguments, temperature=0.7)
        expected = token_logprobs.compute_gradient(*arguments, temperature=0.7)
        assert torch.allclose(actual, expected, atol=1e-6)


@pytest.mark.engine
def test_cuda_ipc_delivers_the_weights_also_after_sleep(tiny, tmp_path):
    engine = start_engine(tiny(), tmp_path, dtype="bfloat16")
    engine.wait_ready()  # before the learner allocates GPU memory
    try:
        learner, weight_check = make_learner_and_weight_check(
            engine, tiny(), tmp_path, is_low_precision=True
        )
        weight_check.canary(version=0)
        sync_weights(engine, learner, version=1)
        weight_check.probe()
        learner.update(padded_batches(random_samples(), 1000))
        engine.sleep()
        engine.wake()
        sync_weights(engine, learner, version=2)  # sleep has discarded the weights
        weight_check.probe()
    finally:
        engine.close()


@pytest.mark.engine
@pytest.mark.parametrize(
    "overrides",
    [[], ["learner.zero_stage=3", "model.gradient_checkpointing=true"], ["engine.sleep=false"]],
)
def test_a_run_on_one_gpu_passes_the_probe_at_every_step(tiny, tmp_path, overrides):
    config = tiny_config(
        tmp_path / "run",
        tiny(),
        model={"dtype": "bfloat16"},
        learner={"zero_stage": 1},
        train={"rollouts": 3, "problems": 4, "group_size": 4},
    )
    config_path = write_config(tmp_path / "config.yaml", config)
    run_grpo(config_path, "engine.memory_fraction=0.2", *overrides)
    gaps = [row["probe/gap"] for row in read_metrics(tmp_path / "run")]
    assert len(gaps) == 4  # before the first rollout and after each rollout
    assert max(gaps) < MAX_GAP_LOW_PRECISION


@pytest.mark.engine
@pytest.mark.parametrize("staleness", [0, 1])
def test_nccl_delivers_the_weights_to_a_server_on_another_gpu(tiny, tmp_path, staleness):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    config = tiny_config(
        tmp_path / "run",
        tiny(),
        model={"dtype": "bfloat16"},
        learner={"zero_stage": 1},
        engine={
            "servers": {"count": 1, "transfer": "nccl"},
            "timeout_s": 200,
            "memory_fraction": 0.2,
        },
        train={"rollouts": 3, "problems": 4, "group_size": 4, "max_staleness": staleness},
    )
    run_grpo(write_config(tmp_path / "config.yaml", config))
    assert max(row["probe/gap"] for row in read_metrics(tmp_path / "run")) < MAX_GAP_LOW_PRECISION
