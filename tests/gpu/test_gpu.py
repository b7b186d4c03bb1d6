"""What only a CUDA device shows: `launch/test.sh -m gpu`.

Seconds and throughput: tests/benchmarks/gpu_cycle.py.
"""

import pytest
import torch
from real_engines import put_together, start_engine
from tiny_models import tiny_config
from training_samples import batches, groups, samples, scored
from whole_runs import rows, run, write_config

from grpo.learning import models, policy
from grpo.learning.batch import micro_batches, to_device
from grpo.learning.learner import Learner
from grpo.learning.policy import HeadOptions, Policy
from grpo.losses.grpo import loss
from grpo.training.weight_sync import MAX_GAP_LOW_PRECISION, sync_weights
from grpo.types import Sample

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_updates_in_bfloat16_are_those_of_float32(tiny, tmp_path, stage, offload):
    ends = {}
    for dtype in ("float32", "bfloat16"):
        settings = {"lr": 1e-3, "zero_stage": stage, "offload_optimizer": offload}
        config = tiny_config(tmp_path, tiny(), model={"dtype": dtype}, learner=settings)
        learner = Learner(models.load_model(tiny(), "packed"), config, loss)
        packed = micro_batches(samples(), [1 / 100] * 10, max_tokens=1000, packed=True)
        ends[dtype] = [learner.update(packed)["policy/grad_norm"] for _ in range(4)]
        moved = {name: weight.float().cpu() for name, weight in learner.weights()}
        learner.save(tmp_path / dtype)
        learner.update(packed)
        learner.load(tmp_path / dtype)
        assert all(
            torch.equal(moved[name], weight.float().cpu()) for name, weight in learner.weights()
        )
    assert ends["bfloat16"] == pytest.approx(ends["float32"], rel=0.05)


@pytest.mark.parametrize("attention", ["packed", "sdpa", "flash_attention_2"])
def test_logprobs_of_8k_tokens_are_the_same_by_every_attention(tiny, attention):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    generator = torch.Generator().manual_seed(0)
    prompt = tuple(torch.randint(10, 200, (100,), generator=generator).tolist())
    ids = [
        prompt + tuple(torch.randint(10, 200, (length,), generator=generator).tolist())
        for length in (8000, 3000)
    ]
    long = [
        Sample(token_ids=each, prompt_length=100, advantages=(1.0,) * (len(each) - 100))
        for each in ids
    ]
    found = {}
    for way, dtype in (("eager", torch.float32), (attention, torch.bfloat16)):
        (batch,) = micro_batches(long, [1.0] * 2, max_tokens=20_000, packed=way == "packed")
        policy = Policy(
            models.load_model(tiny(), way).to(DEVICE, dtype),
            HeadOptions(temperature=1.0, chunk_tokens=512),
        )
        with torch.no_grad():
            logprobs = policy(to_device(batch, DEVICE)).logprobs
        order = torch.tensor(batch.index).argsort()
        found[way] = torch.cat(
            [logprobs[i][batch.token_mask[i].to(DEVICE)] for i in order.tolist()]
        ).float()
    assert (found[attention] - found["eager"]).abs().mean() < 0.05


@pytest.mark.parametrize("kind", ["tiny-qwen2", "tiny-llama", "tiny-qwen3"])
def test_gradients_of_the_packed_stream_are_those_of_float32_on_a_cpu(tiny, kind):
    """Variable-length attention, fused norms and the kernels for log-probabilities, together."""
    values, gradients = scored(models.load_model(tiny(kind), "eager"), groups(), 1000)
    model = models.load_model(tiny(kind), "packed").to(DEVICE, torch.bfloat16)
    models.use_fused_norms(model)
    found, ours = scored(model, groups(), 1000, DEVICE)
    assert (found.cpu() - values)[0].abs().mean() < 0.03  # 0.011 measured on an H200
    whole = float(torch.nn.utils.get_total_norm(gradients.values()))
    for name, gradient in gradients.items():
        assert (
            ours[name].float().cpu() - gradient
        ).norm() < 0.05 * gradient.norm() + 0.001 * whole, name


def test_logprob_kernels_are_pytorchs_operations():
    from grpo.learning import logprob_kernels

    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = 4 * torch.randn(5, 49_153, device=DEVICE, generator=generator)
    targets = torch.randint(0, 49_153, (5,), device=DEVICE, generator=generator)
    grad, entropy_grad = torch.randn(2, 5, device=DEVICE, generator=generator)
    expected, found = (
        values(logits, targets, temperature=0.7)
        for values in (policy._values, logprob_kernels.values)
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    for wanted in (None, entropy_grad):
        arguments = (logits, targets, expected[2], expected[1], grad, wanted)
        found = logprob_kernels.gradient(*arguments, temperature=0.7)
        assert torch.allclose(found, policy._gradient(*arguments, temperature=0.7), atol=1e-6)


@pytest.mark.engine
def test_weights_reach_the_engine_by_cuda_ipc_and_survive_sleep(tiny, tmp_path):
    engine = start_engine(tiny(), tmp_path, dtype="bfloat16")
    engine.wait_ready()  # before anything else takes memory
    try:
        learner, probe = put_together(engine, tiny(), tmp_path, rounds=True)
        probe.canary(version=0)
        sync_weights(engine, learner, version=1)
        probe.probe()
        learner.update(batches(samples(), 1000))
        engine.sleep()
        engine.wake()
        sync_weights(engine, learner, version=2)  # what slept has other weights
        probe.probe()
    finally:
        engine.close()


@pytest.mark.engine
@pytest.mark.parametrize(
    "more",
    [[], ["learner.zero_stage=3", "model.gradient_checkpointing=true"], ["engine.sleep=false"]],
)
def test_a_run_on_one_gpu_is_proved_at_every_step(tiny, tmp_path, more):
    trained = {"rollouts": 3, "problems": 4, "group_size": 4}
    config = tiny_config(
        tmp_path / "run",
        tiny(),
        model={"dtype": "bfloat16"},
        learner={"zero_stage": 1},
        train=trained,
    )
    run(write_config(tmp_path / "config.yaml", config), "engine.memory_fraction=0.2", *more)
    found = rows(tmp_path / "run")
    assert len(found) == 4 and max(row["probe/gap"] for row in found) < MAX_GAP_LOW_PRECISION


@pytest.mark.engine
@pytest.mark.parametrize("staleness", [0, 1])
def test_weights_go_to_a_server_on_another_gpu_by_nccl(tiny, tmp_path, staleness):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pool = {"servers": {"count": 1, "transfer": "nccl"}, "timeout_s": 200, "memory_fraction": 0.2}
    trained = {"rollouts": 3, "problems": 4, "group_size": 4, "max_staleness": staleness}
    sections = {
        "model": {"dtype": "bfloat16"},
        "learner": {"zero_stage": 1},
        "engine": pool,
        "train": trained,
    }
    config = tiny_config(tmp_path / "run", tiny(), **sections)
    run(write_config(tmp_path / "config.yaml", config))
    assert max(row["probe/gap"] for row in rows(tmp_path / "run")) < MAX_GAP_LOW_PRECISION
