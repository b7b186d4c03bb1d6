"""The real vLLM in a child process: samples, weight syncs and their checks, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from real_engines import (
    ENGINE_SETTINGS,
    FULL_BATCH,
    PROMPTS,
    make_learner_and_weight_check,
    start_engine,
)
from tiny_models import Weights, tiny_config

from grpo import config as configs
from grpo.engines import EngineError, Request, SamplingOptions
from grpo.engines.local.engine import SPARE_BYTES, VllmEngine, bytes_to_wake, check_memory
from grpo.learning import models
from grpo.learning.learner import Learner
from grpo.losses.grpo import loss
from grpo.training import weight_sync
from grpo.training.weight_sync import (
    MAX_GAP_FLOAT32,
    MAX_GAP_LOW_PRECISION,
    CheckSettings,
    FirstGap,
    WeightCheck,
    probe_prompts,
    sync_weights,
)
from grpo.types import RunError, UserError

SUPPORT = str(Path(__file__).parents[3] / "support")  # contains faulty_child.py


@pytest.fixture(scope="module")
def engine(tiny, tmp_path_factory):
    engine = start_engine(tiny(), tmp_path_factory.mktemp("engine"), load_weights=True)
    yield engine
    engine.close()


def sample_one(engine, prompt_ids, seed, options):
    """Returns one completion of a prompt."""
    (group,) = engine.generate([Request(prompt_ids=prompt_ids, seed=seed)], options)
    (completion,) = group
    return completion


@pytest.mark.engine
def test_groups_are_reproducible_and_equal_single_requests_with_consecutive_seeds(engine):
    options = SamplingOptions(max_tokens=8, ignore_eos=True)
    requests = [Request(prompt_ids=ids, seed=100 * i, n=3) for i, ids in enumerate(PROMPTS)]
    groups = engine.generate(requests, options)
    repeated_groups = engine.generate(requests, options)
    assert groups == repeated_groups
    group_token_ids = [completion.token_ids for completion in groups[1]]
    single_token_ids = [
        sample_one(engine, PROMPTS[1], seed, options).token_ids for seed in (100, 101, 102)
    ]
    assert single_token_ids == group_token_ids
    assert len(set(group_token_ids)) == 3


@pytest.mark.engine
def test_prompts_that_do_not_fit_in_one_step_are_sampled_like_a_single_prompt(engine):
    """vLLM 0.32 fails on a CPU if it splits the prompt of a request that has a seed.

    Splitting is vLLM's default. The 32 sequences of the first step have 4,800 prompt tokens.
    """
    requests = []
    for i in range(40):
        prompt_ids = tuple(10 + (i * 7 + j) % 180 for j in range(150))
        requests.append(Request(prompt_ids=prompt_ids, seed=i))
    options = SamplingOptions(max_tokens=3, ignore_eos=True)
    groups = engine.generate(requests, options)
    (last_group,) = engine.generate(requests[-1:], options)
    assert len(groups) == 40
    batched_token_ids = [completion.token_ids for completion in groups[-1]]
    assert batched_token_ids == [completion.token_ids for completion in last_group]


@pytest.mark.engine
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_model_at_the_sampling_temperature(engine, tiny, temperature):
    prompt_ids = PROMPTS[0]
    prompt_length = len(prompt_ids)
    (group,) = engine.generate(
        [Request(prompt_ids=prompt_ids, seed=1, n=4)],
        SamplingOptions(max_tokens=8, temperature=temperature),
    )
    model = models.load_model(tiny(), "eager")
    for completion in group:
        token_ids = torch.tensor([prompt_ids + completion.token_ids])  # [1, prompt + T]
        with torch.no_grad():
            logits = model(input_ids=token_ids).logits[0, prompt_length - 1 : -1]  # [T, V]
        all_logprobs = (logits / temperature).log_softmax(-1)
        expected = all_logprobs.gather(1, token_ids[0, prompt_length:, None])[:, 0]  # [T]
        assert torch.allclose(expected, torch.tensor(completion.logprobs), atol=1e-4)


@pytest.mark.engine
def test_stop_token_ends_the_tokens_and_is_not_in_the_text(engine):
    complete = sample_one(
        engine, PROMPTS[0], seed=5, options=SamplingOptions(max_tokens=12, ignore_eos=True)
    )
    assert complete.finish_reason == "length"
    assert len(complete.token_ids) == 12
    stop_token = complete.token_ids[4]
    stopped = sample_one(
        engine,
        PROMPTS[0],
        seed=5,
        options=SamplingOptions(max_tokens=12, stop_token_ids=(stop_token,)),
    )
    num_tokens = complete.token_ids.index(stop_token) + 1
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == complete.token_ids[:num_tokens]
    assert stopped.text == complete.text[: len(stopped.text)]
    assert len(stopped.logprobs) == num_tokens


@pytest.mark.engine
def test_stop_string_is_kept_in_the_text(engine):
    complete = sample_one(
        engine, PROMPTS[2], seed=9, options=SamplingOptions(max_tokens=12, ignore_eos=True)
    )
    stop_string = next(char for char in complete.text[3:] if char.isascii() and char.isalnum())
    options = SamplingOptions(max_tokens=12, ignore_eos=True, stop=(stop_string,))
    stopped = sample_one(engine, PROMPTS[2], seed=9, options=options)
    assert stopped.finish_reason == "stop"
    assert stopped.text == complete.text[: complete.text.index(stop_string) + 1]


@pytest.mark.slow
@pytest.mark.engine
def test_canary_avoids_perturbations_that_amplify_rounding(tiny, tmp_path, monkeypatch):
    """On an H200, the canary stopped SmolLM2-135M at a gap of 0.53.

    Rounding to bfloat16 alone can cause that gap under some perturbations.
    """
    model_dir = tiny("tiny-llama", num_hidden_layers=24, initializer_range=0.2)
    config = tiny_config(
        tmp_path, model_dir, model={"dtype": "bfloat16"}, learner={"zero_stage": 1}
    )
    engine = start_engine(model_dir, tmp_path, dtype="bfloat16")
    try:
        learner = Learner(models.load_model(model_dir, "eager"), config, loss)
        settings = CheckSettings(
            temperature=1.0,
            num_tokens=16,
            max_gap=MAX_GAP_LOW_PRECISION,
            micro_batch_tokens=1024,
            is_low_precision=True,
        )
        weight_check = WeightCheck(engine, learner, probe_prompts(PROMPTS, 4, 96), settings)
        seeds = weight_sync.CANARY_SEEDS[:4]
        samples = weight_check._prompt_samples()
        noises = [
            weight_check._rounding_noise(
                samples, [weight_sync.CANARY_JITTER_OFFSET + seed], perturbation=seed
            )
            for seed in seeds
        ]
        noisiest_seed = seeds[noises.index(max(noises))]
        monkeypatch.setattr(weight_sync, "CANARY_SEEDS", [noisiest_seed])
        with pytest.raises(
            RunError, match=r"the canary found that engine and learner disagree.*allowed 0\.4"
        ):
            weight_check.canary(version=0)
        monkeypatch.setattr(weight_sync, "CANARY_SEEDS", seeds)
        gap = weight_check.canary(version=1)
        assert gap < 2 * min(noises)
        assert 2 * min(noises) < 0.4
    finally:
        engine.close()


# The slow cases run the same code as other cases: micro-qwen2 is a smaller tiny-qwen2, and all
# tied heads are handled by one function.
MODELS = [
    ("tiny-qwen2", True),
    ("tiny-llama", False),
    ("tiny-qwen2", False),
    ("tiny-qwen3", False),
    ("tiny-qwen3-moe", False),
    pytest.param("micro-qwen2", False, marks=pytest.mark.slow),
    pytest.param("micro-qwen2", True, marks=pytest.mark.slow),
    pytest.param("tiny-llama", True, marks=pytest.mark.slow),
    pytest.param("tiny-qwen3", True, marks=pytest.mark.slow),
    pytest.param("tiny-qwen3-moe", True, marks=pytest.mark.slow),
]


@pytest.mark.engine
@pytest.mark.parametrize(("kind", "tied"), MODELS)
def test_every_weight_reaches_the_engine(tiny, tmp_path, kind, tied):
    """A complete sync passes the canary and the probe.

    For models without a tied head, the probe's gap also shows a single tensor with old values.
    """
    model_dir = tiny(kind, tie_word_embeddings=tied)
    engine = start_engine(model_dir, tmp_path)
    try:
        learner, weight_check = make_learner_and_weight_check(engine, model_dir, tmp_path)
        assert weight_check.canary(version=0) < 1e-4
        report = sync_weights(engine, learner, version=1)
        assert report.version == 1
        assert weight_check.probe().gap < 1e-4
        completion = sample_one(engine, PROMPTS[0], seed=1, options=SamplingOptions(max_tokens=4))
        assert completion.versions == ((1, 0, len(completion.token_ids)),)
        if not tied:
            assert_each_stale_tensor_is_detected(engine, learner, weight_check)
    finally:
        engine.close()


def assert_each_stale_tensor_is_detected(engine, learner, weight_check):
    original_weights = {name: weight.clone() for name, weight in learner.weights()}
    with learner.perturbed(seed=20_000):
        perturbed_weights = {name: weight.clone() for name, weight in learner.weights()}
        for stale_name in perturbed_weights:
            weights = Weights(perturbed_weights)
            weights[stale_name] = original_weights[stale_name]
            engine.load_weights(weights, version=2)
            assert weight_check.gaps().mean > MAX_GAP_FLOAT32, (
                f"a stale {stale_name} is not detected"
            )


class FaultyEngine(VllmEngine):
    """An engine whose child process has a fault (tests/support/faulty_child.py)."""

    child_module = "faulty_child"
    fault_file: Path  # contains the name of the fault; the child reads it in every sync

    def set_fault(self, fault):
        self.fault_file.write_text(fault)


def start_faulty_engine(model_dir, folder, fault, dtype="float32"):
    fault_file = folder / "fault"
    fault_file.write_text(fault)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRPO_TEST_FAULT", str(fault_file))
        patch.setenv("PYTHONPATH", SUPPORT)
        engine = start_engine(model_dir, folder, FaultyEngine, dtype=dtype)
    engine.fault_file = fault_file
    return engine


@pytest.fixture(scope="module")
def faulty_engine(tiny, tmp_path_factory):
    engine = start_faulty_engine(tiny(), tmp_path_factory.mktemp("faulty"), "none")
    yield engine
    engine.close()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("stale head", "the canary found"),
        ("swapped", "the canary found"),
        ("zeroed", "the canary found"),
        ("missing layer", r"weights of the engine's model did not arrive: model.layers.1"),
        ("flipped bit", r"the bytes of model.layers.0.\S+ differ from those that were sent"),
        ("stale layer", "the probe found"),
        ("stale cache", "the probe found"),
    ],
)
def test_faulty_sync_is_detected_before_the_first_rollout(
    tiny, tmp_path, faulty_engine, fault, message
):
    learner, weight_check = make_learner_and_weight_check(faulty_engine, tiny(), tmp_path)
    # A sync without a fault removes the effects of the previous test.
    faulty_engine.set_fault("none")
    sync_weights(faulty_engine, learner, version=0)
    faulty_engine.set_fault(fault)
    with pytest.raises(RunError, match=message):
        weight_check.canary(version=0)
        sync_weights(faulty_engine, learner, version=1)
        weight_check.probe()


@pytest.mark.engine
@pytest.mark.parametrize("batch_size", [1, len(PROMPTS), FULL_BATCH])
def test_stale_cuda_graph_of_one_batch_size_is_detected(tiny, tmp_path, faulty_engine, batch_size):
    learner, weight_check = make_learner_and_weight_check(faulty_engine, tiny(), tmp_path)
    faulty_engine.set_fault("none")
    sync_weights(faulty_engine, learner, version=0)
    gaps = weight_check.gaps(full_batch=True)
    assert sorted(gaps.by_batch_size) == [1, len(PROMPTS), FULL_BATCH]
    assert max(gaps.by_batch_size.values()) < 1e-4
    faulty_engine.set_fault(f"stale graph {batch_size}")
    stale_gaps = weight_check.gaps(full_batch=True).by_batch_size
    assert [size for size, gap in stale_gaps.items() if gap > 1e-4] == [batch_size]
    with pytest.raises(RunError, match=rf"in the batch .*{batch_size}: [\d.]+.*, allowed 0\.002"):
        weight_check.probe(full_batch=True)


@pytest.mark.engine
def test_gap_that_grows_since_the_first_probe_stops_the_run_below_the_absolute_limit(
    tiny, tmp_path, faulty_engine
):
    learner, weight_check = make_learner_and_weight_check(faulty_engine, tiny(), tmp_path)
    faulty_engine.set_fault("none")
    sync_weights(faulty_engine, learner, version=0)
    assert weight_check.probe().limit == MAX_GAP_FLOAT32
    assert weight_check.first_gap.gap < 1e-5
    # The learner's weights change, and the engine keeps the old ones.
    for _, weight in learner.weights():
        weight.mul_(1 + 2e-4)
    assert 3e-4 < weight_check.gaps().mean < MAX_GAP_FLOAT32
    with pytest.raises(RunError, match=r"allowed 0\.00025"):
        weight_check.probe()
    # Five times this gap is below the absolute limit.
    weight_check.first_gap = FirstGap(gap=1.5e-4, max_gap=MAX_GAP_FLOAT32)
    assert weight_check.probe().limit == pytest.approx(7.5e-4)
    weight_check.first_gap = FirstGap(gap=9e-4, max_gap=MAX_GAP_FLOAT32)
    assert weight_check.probe().limit == MAX_GAP_FLOAT32
    # A gap of another precision has no effect.
    weight_check.first_gap = FirstGap(gap=1e-9, max_gap=MAX_GAP_LOW_PRECISION)
    assert weight_check.probe().limit == MAX_GAP_FLOAT32


@pytest.mark.engine
def test_growing_gap_stops_the_run_only_if_it_is_more_than_rounding_noise(
    tiny, tmp_path, monkeypatch
):
    engine = start_engine(tiny(), tmp_path, dtype="bfloat16")
    try:
        learner, weight_check = make_learner_and_weight_check(
            engine, tiny(), tmp_path, is_low_precision=True
        )
        sync_weights(engine, learner, version=0)
        # Every gap is now more than five times the first one, and above the share of `max_gap`.
        monkeypatch.setattr(weight_sync, "HEALTHY_SHARE", 0.0)
        weight_check.first_gap = FirstGap(gap=1e-9, max_gap=MAX_GAP_LOW_PRECISION)
        report = weight_check.probe()
        assert 1e-4 < report.gap < report.limit < MAX_GAP_LOW_PRECISION
        # The learner's weights change, and the engine keeps the old ones.
        for _, weight in learner.weights():
            weight.mul_(1.05)
        assert weight_check.gaps().mean < MAX_GAP_LOW_PRECISION
        with pytest.raises(RunError, match=r"the probe found that engine and learner disagree"):
            weight_check.probe()
    finally:
        engine.close()


def test_without_a_full_batch_nothing_is_sampled_for_it():
    assert weight_sync._full_batch([(1, 2), (3, 4)], 0) == ([], [])


@pytest.mark.parametrize("size", [3, 4, 16, 30, 256])
def test_full_batch_compares_every_prompt(size):
    prompts = [(1, 2), (3, 4), (5, 6), (7, 8)]
    batch = weight_sync._full_batch(prompts, size)
    assert len(batch.requests) == size
    assert len({request.seed for request in batch.requests}) == size
    compared = [batch.requests[index].prompt_ids for index in batch.compared]
    assert compared == prompts[:size]
    assert batch.compared[-1] == size - 1


@pytest.mark.engine
@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_f"),
    reason="without AVX-512, vLLM has no packed copy of a bfloat16 head that could be stale",
)
def test_stale_head_is_detected_in_bfloat16(tiny, tmp_path):
    engine = start_faulty_engine(tiny(), tmp_path, "stale head", dtype="bfloat16")
    try:
        _, weight_check = make_learner_and_weight_check(
            engine, tiny(), tmp_path, is_low_precision=True
        )
        with pytest.raises(
            RunError, match=r"the canary found that engine and learner disagree.*allowed 0\.2"
        ):
            weight_check.canary(version=0)
    finally:
        engine.close()


@pytest.mark.engine
def test_calls_to_a_frozen_engine_and_to_a_killed_engine_are_errors(tiny, tmp_path):
    engine = start_engine(tiny(), tmp_path, load_weights=True)
    requests = [Request(prompt_ids=PROMPTS[0], seed=1)]
    try:
        engine.wait_ready()
        engine._settings = ENGINE_SETTINGS.model_copy(update={"timeout_s": 1.0})
        os.kill(engine._child.pid, signal.SIGSTOP)
        with pytest.raises(EngineError, match="did not answer `generate` within 1 s"):
            engine.generate(requests, SamplingOptions(max_tokens=4))
        psutil.Process(engine._child.pid).kill()
        with pytest.raises(EngineError, match="killed by SIGKILL"):
            engine.generate(requests, SamplingOptions(max_tokens=100))
    finally:
        engine.close()


def test_error_of_an_engine_that_ends_during_its_start_contains_the_exit_code(tmp_path):
    engine = start_faulty_engine("nowhere", tmp_path, "dies at start")
    with pytest.raises(EngineError, match="died during `start`: exit code 7"):
        engine.wait_ready()
    engine.close()


# Starts an engine in the background, prints the process id of its child and sleeps.
PARENT_PROGRAM = """\
import sys
import time
from pathlib import Path

from grpo import config
from grpo.engines.local.engine import VllmEngine
from grpo.engines.vllm_options import ServedModel

engine = VllmEngine(
    model=ServedModel(model_dir=sys.argv[1], dtype="float32", max_model_len=64),
    settings=config.EngineSettings(kv_cache_gb=0.05),
    log_file=Path(sys.argv[2]),
)
print(engine._child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.engine
def test_engine_ends_with_its_parent(tmp_path, tiny):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT_PROGRAM, str(tiny()), str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        text=True,
    )
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(1)
    parent.kill()
    parent.wait()
    child.wait(timeout=5)


def test_insufficient_memory_is_a_user_error():
    with pytest.raises(UserError, match=r"KV cache 100000 GiB.*lower engine.kv_cache_gb"):
        check_memory(configs.EngineSettings(kv_cache_gb=100_000), weight_bytes=0)


def test_a_waking_engine_needs_its_memory_and_two_buffers_of_the_sync():
    gib = 2**30
    assert bytes_to_wake(30 * gib, buffer_bytes=gib) == 32 * gib + SPARE_BYTES
