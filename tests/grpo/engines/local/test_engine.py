"""The real vLLM in its child process: what it samples, the weights that it holds, how it dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from real_engines import PROMPTS, SETTINGS, put_together, start_engine
from tiny_models import Weights, tiny_config

from grpo import config as configs
from grpo.engines import EngineError, Request, SamplingOptions
from grpo.engines.local.engine import VllmEngine, check_memory
from grpo.learning import models
from grpo.learning.learner import Learner
from grpo.losses.grpo import loss
from grpo.training import weight_sync
from grpo.training.weight_sync import (
    MAX_GAP_FLOAT32,
    MAX_GAP_ROUNDED,
    CheckSettings,
    WeightCheck,
    probe_prompts,
    sync,
)
from grpo.types import RunError, UserError

SUPPORT = str(Path(__file__).parents[3] / "support")  # where faulty_child.py lies


@pytest.fixture(scope="module")
def engine(tiny, tmp_path_factory):
    engine = start_engine(tiny(), tmp_path_factory.mktemp("engine"), load_weights=True)
    yield engine
    engine.close()


@pytest.mark.engine
def test_groups_single_requests_and_repeats_agree(engine):
    options = SamplingOptions(max_tokens=8, ignore_eos=True)
    groups = engine.generate(
        [Request(prompt_ids=p, seed=100 * i, n=3) for i, p in enumerate(PROMPTS)], options
    )
    again = engine.generate(
        [Request(prompt_ids=p, seed=100 * i, n=3) for i, p in enumerate(PROMPTS)], options
    )
    assert groups == again
    single = [
        engine.generate([Request(prompt_ids=PROMPTS[1], seed=100 + i)], options)[0][0]
        for i in range(3)
    ]
    assert [c.token_ids for c in single] == [c.token_ids for c in groups[1]]
    assert len({c.token_ids for c in groups[1]}) == 3


@pytest.mark.engine
def test_more_prompt_tokens_than_one_step_takes_are_sampled_like_a_few(engine):
    """vLLM 0.32 ends in an error on a CPU when it cuts a prompt in pieces (its default) and a
    request has a seed.
    """
    requests = [
        Request(prompt_ids=tuple(10 + (i * 7 + j) % 180 for j in range(150)), seed=i)
        for i in range(40)
    ]  # 32 at once: 4,800 tokens
    options = SamplingOptions(max_tokens=3, ignore_eos=True)
    together = engine.generate(requests, options)
    alone = engine.generate(requests[-1:], options)
    assert [c.token_ids for c in together[-1]] == [c.token_ids for c in alone[0]] and len(
        together
    ) == 40


@pytest.mark.engine
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_samplers_after_temperature(engine, tiny, temperature):
    (group,) = engine.generate(
        [Request(prompt_ids=PROMPTS[0], seed=1, n=4)],
        SamplingOptions(max_tokens=8, temperature=temperature),
    )
    model = models.load_model(tiny(), "eager")
    for completion in group:
        ids = torch.tensor([PROMPTS[0] + completion.token_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(PROMPTS[0]) - 1 : -1] / temperature
        expected = logits.log_softmax(-1).gather(1, ids[0, len(PROMPTS[0]) :, None])[:, 0]
        assert torch.allclose(expected, torch.tensor(completion.logprobs), atol=1e-4)


@pytest.mark.engine
def test_stop_reasons_eos_kept_in_tokens_and_not_in_text(engine):
    free, *_ = engine.generate(
        [Request(prompt_ids=PROMPTS[0], seed=5)], SamplingOptions(max_tokens=12, ignore_eos=True)
    )[0]
    assert free.finish_reason == "length" and len(free.token_ids) == 12
    end = free.token_ids[4]
    (stopped,) = engine.generate(
        [Request(prompt_ids=PROMPTS[0], seed=5)],
        SamplingOptions(max_tokens=12, stop_token_ids=(end,)),
    )[0]
    first = free.token_ids.index(end)
    assert stopped.finish_reason == "stop" and stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.text == free.text[: len(stopped.text)] and len(stopped.logprobs) == first + 1


@pytest.mark.engine
def test_a_stop_string_stays_in_the_text(engine, tiny):
    free, *_ = engine.generate(
        [Request(prompt_ids=PROMPTS[2], seed=9)], SamplingOptions(max_tokens=12, ignore_eos=True)
    )[0]
    mark = next(char for char in free.text[3:] if char.isascii() and char.isalnum())
    options = SamplingOptions(max_tokens=12, ignore_eos=True, stop=(mark,))
    (stopped,) = engine.generate([Request(prompt_ids=PROMPTS[2], seed=9)], options)[0]
    assert (
        stopped.finish_reason == "stop" and stopped.text == free.text[: free.text.index(mark) + 1]
    )


@pytest.mark.slow
@pytest.mark.engine
def test_a_perturbation_that_amplifies_rounding_does_not_fail_the_canary(
    tiny, tmp_path, monkeypatch
):
    """On an H200 the canary stopped SmolLM2-135M with a gap of 0.53, which the noise of bfloat16
    alone can cause.
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
            max_gap=MAX_GAP_ROUNDED,
            micro_batch_tokens=1024,
            rounds=True,
        )
        probe = WeightCheck(engine, learner, probe_prompts(PROMPTS, 4, 96), settings)
        seeds = weight_sync.CANARY_SEEDS[:4]
        noises = [probe._rounding_noise(seed) for seed in seeds]
        monkeypatch.setattr(weight_sync, "CANARY_SEEDS", [seeds[noises.index(max(noises))]])
        with pytest.raises(
            RunError, match=r"the canary found that engine and learner disagree.*allowed 0\.4"
        ):
            probe.canary(version=0)
        monkeypatch.setattr(weight_sync, "CANARY_SEEDS", seeds)
        assert probe.canary(version=1) < 2 * min(noises) < 0.4
    finally:
        engine.close()


# The slow ones share their code with another: micro-qwen2 is a smaller tiny-qwen2, and one function
# ties all heads.
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
def test_every_single_weight_reaches_the_engine(tiny, tmp_path, kind, tied):
    """The canary passes for the real sync, and a stale copy of any one tensor is seen.

    By its name, or by the gap.
    """
    model_dir = tiny(kind, tie_word_embeddings=tied)
    engine = start_engine(model_dir, tmp_path)
    try:
        learner, probe = put_together(engine, model_dir, tmp_path)
        assert probe.canary(version=0) < 1e-4
        report = sync(engine, learner, version=1)
        assert report.version == 1 and probe.probe().gap < 1e-4
        (group,) = engine.generate(
            [Request(prompt_ids=PROMPTS[0], seed=1)], SamplingOptions(max_tokens=4)
        )
        assert group[0].versions == ((1, 0, len(group[0].token_ids)),)
        true = {name: weight.clone() for name, weight in learner.weights()}
        if tied:
            return
        with learner.perturbed(seed=20_000):
            sent = {name: weight.clone() for name, weight in learner.weights()}
            for stale in sent:
                engine.load_weights(Weights(sent | {stale: true[stale]}), version=2)
                assert probe.gap() > MAX_GAP_FLOAT32, f"a stale {stale} is not seen"
    finally:
        engine.close()


class FaultyEngine(VllmEngine):
    child_module = "faulty_child"


def start_faulty(model_dir, folder, fault, dtype="float32"):
    """Returns an engine with a fault and the file that names it."""
    file = folder / "fault"
    file.write_text(fault)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRPO_TEST_FAULT", str(file))
        patch.setenv("PYTHONPATH", SUPPORT)
        return start_engine(model_dir, folder, FaultyEngine, dtype=dtype), file


@pytest.fixture(scope="module")
def faulty(tiny, tmp_path_factory):
    engine, file = start_faulty(tiny(), tmp_path_factory.mktemp("faulty"), "none")
    yield engine, file
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
def test_a_fault_in_the_sync_is_seen_before_the_first_rollout(
    tiny, tmp_path, faulty, fault, message
):
    engine, file = faulty
    learner, probe = put_together(engine, tiny(), tmp_path)
    file.write_text("none")
    sync(engine, learner, version=0)  # what the test before this one left is gone
    file.write_text(fault)
    with pytest.raises(RunError, match=message):
        probe.canary(version=0)
        sync(engine, learner, version=1)
        probe.probe()


@pytest.mark.engine
def test_a_stale_head_is_seen_in_bfloat16_too(tiny, tmp_path):
    engine, _ = start_faulty(tiny(), tmp_path, "stale head", dtype="bfloat16")
    try:
        _, probe = put_together(engine, tiny(), tmp_path, rounds=True)
        with pytest.raises(
            RunError, match=r"the canary found that engine and learner disagree.*allowed 0\.2"
        ):
            probe.canary(version=0)
    finally:
        engine.close()


@pytest.mark.engine
def test_an_engine_that_hangs_and_one_that_is_killed_are_errors_that_say_so(tiny, tmp_path):
    engine = start_engine(tiny(), tmp_path, load_weights=True)
    request = [Request(prompt_ids=PROMPTS[0], seed=1)]
    try:
        engine.wait_ready()
        engine._settings = SETTINGS.model_copy(update={"timeout_s": 1.0})
        os.kill(engine._child.pid, signal.SIGSTOP)
        with pytest.raises(EngineError, match="did not answer `generate` within 1 s"):
            engine.generate(request, SamplingOptions(max_tokens=4))
        psutil.Process(engine._child.pid).kill()
        with pytest.raises(EngineError, match="killed by SIGKILL"):
            engine.generate(request, SamplingOptions(max_tokens=100))
    finally:
        engine.close()


def test_an_engine_that_dies_at_start_says_how(tmp_path):
    engine, _ = start_faulty("nowhere", tmp_path, "dies at start")
    with pytest.raises(EngineError, match="died during `start`: exit code 7"):
        engine.wait_ready()
    engine.close()


@pytest.mark.engine
def test_the_engine_dies_with_its_parent(tmp_path, tiny):
    program = (
        "import sys, time; from pathlib import Path; from grpo import config; from "
        "grpo.engines.local.engine import VllmEngine; from grpo.engines.vllm_options import "
        "ServedModel\n"
        "model = ServedModel(model_dir=sys.argv[1], dtype='float32', max_model_len=64)\n"
        "engine = VllmEngine(model=model, settings=config.Engine(kv_cache_gb=0.05), "
        "log_file=Path(sys.argv[2]))\n"
        "print(engine._child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tiny()), str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        text=True,
    )
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(1)
    parent.kill()
    parent.wait()
    child.wait(timeout=5)


def test_too_little_memory_is_told_before_the_engine_starts():
    with pytest.raises(UserError, match=r"KV cache 100000 GB.*lower engine.kv_cache_gb"):
        check_memory(configs.Engine(kv_cache_gb=100_000), weight_bytes=0)
