"""The simulator: hand calculations, published step times, and properties of splits.

The tables of docs/cluster.md are checked too.
"""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_shapes import QWEN, Dimensions, bfloat16_shape
from tiny_models import tiny_config
from whole_runs import write_config

from grpo import cli
from grpo import config as configs
from grpo.metrics.memory import MemoryTable
from grpo.metrics.roofline import ModelShape
from grpo.tools.simulate import (
    DEVICES,
    DeviceLayout,
    DeviceRates,
    Workload,
    best_split,
    decode_seconds,
    lognormal_lengths,
    rates_of_run,
    simulate,
    table,
)

H100 = DEVICES["h100"]


def test_bench_and_doctor_print_a_row_for_each_number_of_gpus(tiny, tmp_path, capsys):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny()))
    assert cli.main(["bench", config, "--simulate", "h100", "--mean", "8"]) == 0
    bench_output = capsys.readouterr().out
    num_gpus = ["1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1024"]
    assert first_column(bench_output) == num_gpus
    assert cli.main(["doctor", config, "--gpus"]) == 0
    doctor_output = capsys.readouterr().out
    assert first_column(doctor_output) == ["1", "2", "4", "8", "16", "32", "64"]
    assert not (tmp_path / "run").exists()


def first_column(output):
    return re.findall(r"^\| (\d+) \|", output, re.MULTILINE)


QWEN_1_5B = QWEN["1.5B"]
QWEN_7B = QWEN["7B"]
ROOT = Path(__file__).parents[3]


def sizing_rows():
    """Returns the rows of docs/cluster.md: the memory that each model needs on 1 to 64 GPUs."""
    overrides = [
        "learner.offload_optimizer=false",
        "sampling.max_tokens=8192",
        "learner.micro_batch_tokens=16384",
        "learner.zero_stage=3",
    ]
    config = configs.load(
        str(ROOT / "configs" / "r1_zero_math_7b.yaml"),
        [*overrides, "train={problems: 128, group_size: 8, rollouts: 1}"],
    )
    rows = []
    for name in ("0.5B", "1.5B", "7B", "14B", "32B"):
        shape = QWEN[name]
        table_without_header = MemoryTable(config=config, shape=shape).lines((1, 8, 16, 64))[2:]
        rows += [f"| {name} {row}" for row in table_without_header]
    return rows


def test_the_tables_of_the_cluster_page_are_up_to_date():
    page = (ROOT / "docs" / "cluster.md").read_text()
    assert "\n".join(sizing_rows()) in page
    work = Workload(lengths=lognormal_lengths(1024, 2000, 8192), prompt=200, checkpointing=True)
    step_times = table(H100, QWEN_7B, work, (1, 8, 16, 32, 64, 256, 1024))
    assert "\n".join(step_times) in page


def test_a_simulated_step_is_within_a_third_of_a_published_one():
    """TRL with colocated vLLM, Qwen2.5-1.5B, 8 x 8 completions of at most 256 tokens, one H100.

    Published times: rollout 0.752 s; old logprobs 0.298 s, forward pass 0.301 s and backward pass
    0.653 s.
    """
    work = Workload(lengths=lognormal_lengths(64, 180, 256, 0.4), prompt=105, forwards=1)
    step = simulate(H100, QWEN_1_5B, work, DeviceLayout(learners=1, engines=0))
    assert step.rollout == pytest.approx(0.752, rel=1 / 3)
    assert step.update == pytest.approx(0.298 + 0.301 + 0.653, rel=1 / 3)


@pytest.mark.parametrize(("sequences", "milliseconds"), [(32, 2.6), (64, 3.0), (128, 4.3)])
def test_simulated_decoding_steps_are_within_a_quarter_of_published_ones(sequences, milliseconds):
    """The model, the GPU and the source are those of the test above.

    A published time is per position of the longest completion.
    """
    work = Workload(lengths=lognormal_lengths(sequences, 180, 256, 0.4), prompt=105)
    seconds = decode_seconds(H100, QWEN_1_5B, work.lengths, work)
    assert 1e3 * seconds / max(work.lengths) == pytest.approx(milliseconds, rel=0.25)


@pytest.mark.parametrize(("weights", "seconds"), [(106e9, 3.47), (235e9, 6.22)])
def test_simulated_weight_syncs_are_within_a_factor_of_two_of_published_ones(weights, seconds):
    """checkpoint-engine broadcasts GLM-4.5-Air and Qwen3-235B in bfloat16 on 8 H800 GPUs.

    Source: the README of checkpoint-engine. The simulated devices are H100s.
    """
    model = bfloat16_shape(Dimensions(5120, 94, 4, 151_936, int(weights), tied=False))
    work = Workload(lengths=(100,) * 64, prompt=100)
    step = simulate(H100, model, work, DeviceLayout(learners=8, engines=8))
    assert seconds / 2 < step.sync < 2 * seconds


def test_decoding_time_equals_a_hand_calculation():
    # A sequence of 10 tokens takes 10 steps, and each step reads all weights. A step takes
    # 100 bytes / (10 bytes/s) = 10 s, because the decode share is 1.
    model = ModelShape(
        num_weights=50,
        body_weights=40,
        num_layers=1,
        hidden_size=1,
        vocab_size=10,
        attention_width=1,
        kv_bytes_per_token=0,
        bytes_per_weight=2,
    )
    rates = DeviceRates(flops=1e9, bandwidth=10, network=1, decode=1.0, update=1.0)
    work = Workload(lengths=(10,), prompt=5)
    assert decode_seconds(rates, model, [10], work) == pytest.approx(100)
    # Two sequences are decoded at the same time and share the read. The third one (7 tokens) starts
    # when the first one ends, after 4 steps, and ends after 4 + 7 = 11 steps.
    two_slots = Workload(lengths=(4, 10, 7), prompt=5, concurrency=2)
    assert decode_seconds(rates, model, [4, 10, 7], two_slots) == pytest.approx(110)


@given(st.integers(1, 8), st.floats(50, 2000), st.booleans())
def test_twice_the_engines_never_sample_more_slowly(power, mean, asynchronous):
    work = Workload(lengths=lognormal_lengths(512, mean, 4096), prompt=100)

    def rollout_s(engines):
        layout = DeviceLayout(learners=8, engines=engines, asynchronous=asynchronous)
        return simulate(H100, QWEN_7B, work, layout).rollout

    assert rollout_s(2**power) <= rollout_s(2 ** (power - 1)) * 1.02


@given(st.integers(1, 8), st.floats(50, 2000))
def test_an_asynchronous_step_takes_the_longer_of_rollout_and_update(power, mean):
    work = Workload(lengths=lognormal_lengths(512, mean, 4096), prompt=100)
    layout = DeviceLayout(learners=8, engines=2**power, asynchronous=True)
    step = simulate(H100, QWEN_7B, work, layout)
    assert step.seconds == pytest.approx(max(step.rollout, step.update) + step.sync)
    # The slower side waits only for the weight sync.
    assert min(step.idle) <= step.sync / step.seconds + 1e-9


def test_for_long_completions_the_best_split_has_more_engines_than_learners():
    """AReaL 2505.24298: with three quarters of the devices as engines, a step is faster than with
    an even split.
    """
    work = Workload(lengths=lognormal_lengths(4096, 8000, 32_000), prompt=150, checkpointing=True)
    even = simulate(H100, QWEN_7B, work, DeviceLayout(learners=64, engines=64, asynchronous=True))
    best = best_split(H100, QWEN_7B, work, 128, asynchronous=True)
    assert best.engines > best.learners
    assert best.seconds < even.seconds
    assert best.seconds < best_split(H100, QWEN_7B, work, 128, asynchronous=False).seconds


def test_one_very_long_completion_delays_a_synchronous_rollout_but_not_an_asynchronous_one():
    def rollout_s(completion_lengths, asynchronous):
        work = Workload(lengths=completion_lengths, prompt=100)
        layout = DeviceLayout(learners=8, engines=8, asynchronous=asynchronous)
        return simulate(H100, QWEN_7B, work, layout).rollout

    usual = lognormal_lengths(512, 500, 1000)
    with_straggler = (*lognormal_lengths(511, 500, 1000), 30_000)
    assert rollout_s(with_straggler, False) > 5 * rollout_s(usual, False)
    assert rollout_s(with_straggler, True) < 1.2 * rollout_s(usual, True)


def test_measured_rates_are_the_shares_of_the_rooflines_that_a_run_reached():
    row = {
        "bound/rollout_s": 1.0,
        "time/rollout_s": 4.0,
        "bound/update_s": 2.0,
        "time/update_s": 5.0,
    }
    rates = rates_of_run([row, row], {"machine/gflops": 200.0, "machine/gb_per_s": 20.0})
    assert rates.flops == 200e9
    assert rates.bandwidth == 20e9
    assert rates.decode == 1.0 / 4.0
    assert rates.update == 2.0 / 5.0


def test_the_table_has_a_row_for_each_number_of_gpus():
    rows = table(H100, QWEN_1_5B, Workload(lengths=lognormal_lengths(64, 100, 256), prompt=50))
    num_header_rows = 2
    assert len(rows) == num_header_rows + 11
