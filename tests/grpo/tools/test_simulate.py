"""The simulator.

Limits that must hold, a real step's published seconds, and what is known of splits.
"""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_config
from whole_runs import write_config

from grpo import cli
from grpo import config as configs
from grpo.metrics.roofline import Shape, sizing
from grpo.tools.simulate import (
    DEVICES,
    Layout,
    Rates,
    Work,
    best_split,
    decode_seconds,
    lengths,
    measured,
    simulate,
    table,
)

H100 = DEVICES["h100"]


def test_the_commands_print_the_tables(tiny, tmp_path, capsys):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny()))
    assert cli.main(["bench", config, "--simulate", "h100", "--mean", "8"]) == 0
    table = capsys.readouterr().out
    assert cli.main(["doctor", config, "--gpus"]) == 0
    sizes = [
        re.findall(r"^\| (\d+) \|", out, re.MULTILINE) for out in (table, capsys.readouterr().out)
    ]
    assert sizes == [
        ["1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1024"],
        ["1", "2", "4", "8", "16", "32", "64"],
    ]
    assert not (tmp_path / "run").exists()


def shape(hidden, layers, kv_heads, vocabulary, weights, tied):
    embeddings = vocabulary * hidden
    return Shape(
        num_weights=weights,
        body_weights=weights - embeddings * (1 if tied else 2),
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=vocabulary,
        attention_width=hidden,
        kv_bytes_per_token=2 * layers * kv_heads * 128 * 2,
        bytes_per_weight=2,
    )


QWEN = {  # Qwen2.5: hidden, layers, KV heads, vocabulary, weights, tied
    "0.5B": (896, 24, 1, 151_936, 494_032_768, True),
    "1.5B": (1536, 28, 2, 151_936, 1_543_714_304, True),
    "7B": (3584, 28, 4, 152_064, 7_615_616_512, False),
    "14B": (5120, 48, 8, 152_064, 14_770_033_664, False),
    "32B": (5120, 64, 8, 152_064, 32_763_876_352, False),
}
QWEN_1_5B, QWEN_7B = shape(*QWEN["1.5B"]), shape(*QWEN["7B"])
ROOT = Path(__file__).parents[3]


def sized():
    """The rows of docs/cluster.md: what the models need of 1 to 64 GPUs."""
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
    return [
        f"| {name} {row}"
        for name, numbers in QWEN.items()
        for row in sizing(config, shape(*numbers), (1, 8, 16, 64))[2:]
    ]


def test_the_page_has_what_the_doctor_and_the_simulator_reckon():
    text = (ROOT / "docs" / "cluster.md").read_text()
    work = Work(lengths=lengths(1024, 2000, 8192), prompt=200, checkpointing=True)
    assert (
        "\n".join(sized()) in text
        and "\n".join(table(H100, QWEN_7B, work, (1, 8, 16, 32, 64, 256, 1024))) in text
    )


def test_a_published_step_within_a_third():
    """TRL with colocated vLLM, Qwen2.5-1.5B, 8 x 8 completions of at most 256 tokens, one H100.

    0.752 s, 1.27 s with the old logprobs.
    """
    step = simulate(
        H100,
        QWEN_1_5B,
        Work(lengths=lengths(64, 180, 256, 0.4), prompt=105, forwards=1),
        Layout(learners=1, engines=0),
    )
    assert step.rollout == pytest.approx(0.752, rel=1 / 3) and step.update == pytest.approx(
        0.298 + 0.301 + 0.653, rel=1 / 3
    )


@pytest.mark.parametrize(("sequences", "milliseconds"), [(32, 2.6), (64, 3.0), (128, 4.3)])
def test_published_decode_steps_within_a_quarter(sequences, milliseconds):
    """The same model and GPU.

    Per position of the longest sample, slots occupied by 0.66 to 0.40 (recipes 4.1, 4.2).
    """
    work = Work(lengths=lengths(sequences, 180, 256, 0.4), prompt=105)
    seconds = decode_seconds(H100, QWEN_1_5B, work.lengths, work)
    assert 1e3 * seconds / max(work.lengths) == pytest.approx(milliseconds, rel=0.25)


@pytest.mark.parametrize(("weights", "seconds"), [(106e9, 3.47), (235e9, 6.22)])
def test_published_syncs_of_large_models_within_a_factor_of_two(weights, seconds):
    """checkpoint-engine on 8 x H800, broadcast.

    GLM-4.5-Air and Qwen3-235B in bfloat16 (recipes 4.3).
    """
    model = shape(5120, 94, 4, 151_936, int(weights), False)
    step = simulate(
        H100, model, Work(lengths=(100,) * 64, prompt=100), Layout(learners=8, engines=8)
    )
    assert seconds / 2 < step.sync < 2 * seconds


def test_by_hand():
    # One sequence of 10 tokens: 10 steps that each read all weights. 100 bytes / (10 bytes/s) = 10
    # s a step at a decode share of 1.
    model = Shape(
        num_weights=50,
        body_weights=40,
        num_layers=1,
        hidden_size=1,
        vocab_size=10,
        attention_width=1,
        kv_bytes_per_token=0,
        bytes_per_weight=2,
    )
    rates = Rates(flops=1e9, bandwidth=10, network=1, decode=1.0, update=1.0)
    work = Work(lengths=(10,), prompt=5)
    assert decode_seconds(rates, model, [10], work) == pytest.approx(100)
    # Two at once share the reading; a third waits for the first to end: 4 + 6 steps beside, then 1
    # more alone.
    two = Work(lengths=(4, 10, 7), prompt=5, concurrency=2)
    assert decode_seconds(rates, model, [4, 10, 7], two) == pytest.approx(110)


@given(st.integers(1, 8), st.floats(50, 2000), st.booleans())
def test_more_engines_never_take_longer_and_an_asynchronous_step_is_its_longer_side(
    power, mean, asynchronous
):
    work = Work(lengths=lengths(512, mean, 4096), prompt=100)
    few, many = (
        simulate(H100, QWEN_7B, work, Layout(learners=8, engines=2**n, asynchronous=asynchronous))
        for n in (power - 1, power)
    )
    assert many.rollout <= few.rollout * 1.02
    step = simulate(H100, QWEN_7B, work, Layout(learners=8, engines=2**power, asynchronous=True))
    assert step.seconds == pytest.approx(max(step.rollout, step.update) + step.sync)
    assert min(step.idle) <= step.sync / step.seconds + 1e-9


def test_long_completions_want_most_devices_to_sample():
    """AReaL 2505.24298: three quarters on generation beat an even split, at long completions."""
    work = Work(lengths=lengths(4096, 8000, 32_000), prompt=150, checkpointing=True)
    even = simulate(H100, QWEN_7B, work, Layout(learners=64, engines=64, asynchronous=True))
    best = best_split(H100, QWEN_7B, work, 128, asynchronous=True)
    assert best.engines > best.learners and best.seconds < even.seconds
    assert best.seconds < best_split(H100, QWEN_7B, work, 128, asynchronous=False).seconds


def test_a_straggler_costs_a_synchronous_step_its_whole_length_and_an_asynchronous_one_its_share():
    usual, one_long = lengths(512, 500, 1000), (*lengths(511, 500, 1000), 30_000)
    for asynchronous, most in ((False, 1e9), (True, 1.2)):
        steps = [
            simulate(
                H100,
                QWEN_7B,
                Work(lengths=rows, prompt=100),
                Layout(learners=8, engines=8, asynchronous=asynchronous),
            ).rollout
            for rows in (usual, one_long)
        ]
        assert (steps[1] > 5 * steps[0]) == (not asynchronous) and steps[1] < most * steps[0]


def test_a_runs_metrics_give_rates_that_give_back_its_seconds():
    row = {
        "bound/rollout_s": 1.0,
        "time/rollout_s": 4.0,
        "bound/update_s": 2.0,
        "time/update_s": 5.0,
    }
    rates = measured([row, row], {"machine/gflops": 200.0, "machine/gb_per_s": 20.0})
    assert (rates.flops, rates.bandwidth, rates.decode, rates.update) == (200e9, 20e9, 0.25, 0.4)


def test_the_table_has_every_size():
    assert len(table(H100, QWEN_1_5B, Work(lengths=lengths(64, 100, 256), prompt=50))) == 2 + 11
