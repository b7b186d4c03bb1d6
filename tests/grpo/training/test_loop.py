"""The training loop with a real learner and an engine that draws random tokens.

Every preset resumes bit for bit; problems and groups are filtered and resampled; references,
adapters and routers are updated as configured. The tests with the real engine are in
tests/grpo/stages/test_train.py and tests/slow.
"""

import json
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from random_loop import make_loop
from safetensors.torch import load_file

from grpo.config.presets import PRESETS
from grpo.experience.selection import has_training_signal, pass_rate
from grpo.learning import lora, models
from grpo.learning.advantages import advantages, completion_lengths, to_samples
from grpo.run.display import Timer
from grpo.training.weight_sync import FirstGap
from grpo.types import (
    Problem,
    RunError,
    ScoredGroup,
    TrainingStoppedError,
    UserError,
    Verdict,
)

SMALL_TRAIN = {"rollouts": 3, "problems": 4, "group_size": 4}
# Recipes that are tested in addition to the presets.
MANY_OPTIONS = {
    "train": {**SMALL_TRAIN, "updates_per_rollout": 2, "epochs": 2},
    "algorithm": {
        "kl_coef": 0.1,
        "kl_unbiased": True,
        "reference_reset": 3,
        "reset_optimizer": True,
        "mismatch": "tis",
        "no_signal": "resample",
        "drop_solved": 0.9,
        "truncated": "mask",
        "entropy_coef": 0.01,
        "top_entropy": 0.5,
        "dual_clip": 4.0,
        "off_policy_max": 0.5,
        "drift_coef": 0.001,
    },
}
LORA = {
    "model": {"lora": {"rank": 4}},
    "algorithm": {"kl_coef": 0.1},
    "learner": {"lr": 1e-2, "zero_stage": 1},
}


class LoopState(NamedTuple):
    metrics: dict[str, Any]  # last row, without times and rates
    weights: dict[str, torch.Tensor]
    selection: dict[str, Any]


def state_of(loop):
    rows = [
        json.loads(line)
        for line in loop.run.metrics.read_text().splitlines()
        if "reward/mean" in line
    ]
    return LoopState(
        metrics={key: value for key, value in rows[-1].items() if not is_timing(key)},
        weights={name: weight.clone() for name, weight in loop.updater.learner.weights()},
        selection=loop.rollouts.selection.state(),
    )


def is_timing(key):
    return key.startswith(("time/", "bound/", "idle/")) or "seconds" in key or "per_s" in key


def sections_of(recipe):
    """Returns the config sections of a preset, of "everything" or of "lora"."""
    if recipe == "everything":
        return MANY_OPTIONS
    if recipe == "lora":
        return LORA
    # tiny_config sets kl_coef to 0, which would replace the value of the preset.
    kl_coef = PRESETS[recipe].settings["algorithm.kl_coef"]
    sections = {"algorithm": {"preset": recipe, "kl_coef": kl_coef}, "train": SMALL_TRAIN}
    if recipe.startswith("on_policy_distill"):
        sections["model"] = {"teacher": "another"}
    return sections


def collect_groups(loop):
    """Samples the groups of one rollout and returns those that the update uses."""

    def sample(problems, number):
        return loop.rollouts.sample(problems, 0, number, Timer())

    return loop.rollouts.selection.collect(sample).used


def samples_of(groups):
    rewards = [scored.rewards for scored in groups]
    return to_samples(groups, advantages(rewards, completion_lengths(groups), "none"))


def test_a_checkpoint_contains_the_gap_of_the_first_probe(tiny, tmp_path):
    first = make_loop(tmp_path, tiny)
    first.weight_check.first_gap = FirstGap(gap=0.025, max_gap=0.2)
    first.step()
    first.save()
    first.run._lock.close()
    resumed = make_loop(tmp_path, tiny, resume=True)
    assert resumed.weight_check.first_gap == FirstGap(gap=0.025, max_gap=0.2)


def test_per_reward_normalizes_the_rewards_of_the_run_with_their_weights(tiny, tmp_path):
    # `few` prefers short completions. It has small values, and the weight 0.5.
    def few(groups, prompts):
        return [[-0.01 * len(c.token_ids) for c in group.completions] for group in groups]

    sections = {"algorithm": {"preset": "gdpo"}, "train": SMALL_TRAIN}
    loop = make_loop(tmp_path, tiny, **sections)
    loop.rollouts.rewards["few"] = (few, 0.5)
    loop.step()
    rows = [
        json.loads(line)
        for line in (tmp_path / "samples" / "step-000001.jsonl").read_text().splitlines()
    ]
    sums = []
    for start in range(0, len(rows), 4):  # group by group
        parts = {
            name: torch.tensor([row["parts"][name] for row in rows[start : start + 4]])
            for name in ("even", "few")
        }
        normalized = {
            name: (values - values.mean()) / (values.std(correction=0) + 1e-6)
            for name, values in parts.items()
        }
        sums += (normalized["even"] + 0.5 * normalized["few"]).tolist()
    expected = torch.tensor(sums)
    expected /= expected.std(correction=0) + 1e-6
    actual = torch.tensor([row["advantage"] for row in rows])
    assert torch.allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("recipe", [*PRESETS, "everything", "lora"])
def test_two_rollouts_and_a_resume_equal_three_rollouts_bit_for_bit(tiny, tmp_path, recipe):
    sections = sections_of(recipe)
    uninterrupted = make_loop(tmp_path / "a", tiny, **sections)
    uninterrupted.train()

    first = make_loop(tmp_path / "b", tiny, **sections)
    first.step()
    first.step()
    first.save()
    first.run._lock.close()
    resumed = make_loop(tmp_path / "b", tiny, resume=True, **sections)
    resumed.train()

    expected = state_of(uninterrupted)
    actual = state_of(resumed)
    assert actual.metrics == expected.metrics
    assert actual.selection == expected.selection
    for name, weight in expected.weights.items():
        assert torch.equal(weight, actual.weights[name])
    # The third rollout updates the weights.
    assert any(
        not torch.equal(weight, first.engine.weights[name])
        for name, weight in actual.weights.items()
    )
    assert expected.metrics["update/made"] > 0
    assert expected.metrics["policy/grad_norm"] > 0


def test_dynamic_sampling_uses_every_accepted_group_once_and_carries_the_surplus(tiny, tmp_path):
    loop = make_loop(
        tmp_path,
        tiny,
        algorithm={"no_signal": "resample"},
        train={"rollouts": 12, "problems": 4, "group_size": 2},
    )
    selection = loop.rollouts.selection
    collect = selection.collect
    accepted = []
    used = []
    num_carried = []

    def recording_collect(sample):
        selected = collect(sample)
        for scored in selected.sampled:
            if max(scored.rewards) != min(scored.rewards):
                accepted.append(scored)
        used.extend(selected.used)
        num_carried.append(len(selection.carried))
        assert len(selected.used) == 4
        return selected

    selection.collect = recording_collect
    loop.train()
    assert any(num_carried), "no group was carried with this seed"
    expected = [id(scored) for scored in [*used, *selection.carried]]
    assert [id(scored) for scored in accepted] == expected


def test_tokens_of_other_weights_have_the_sampler_logprobs_as_old_logprobs(tiny, tmp_path):
    loop = make_loop(tmp_path, tiny, algorithm={"no_signal": "resample"})
    samples = samples_of(collect_groups(loop))
    current_version = loop.progress.rollout + 1
    for sample in samples:
        assert set(sample.versions) == {current_version}
        assert len(sample.versions) > 1

    # In group 0, the first token of each sample was sampled by other weights.
    samples = [
        replace(sample, versions=(7, *sample.versions[1:])) if sample.group == 0 else sample
        for sample in samples
    ]
    ((batch,),) = loop.updater.prepare([samples], loop.progress.rollout)
    (learner_scores,) = loop.updater.learner.score([batch])
    for row, sample_index in enumerate(batch.sample_indices):
        mask = batch.token_mask[row]
        expected = learner_scores.logprobs[row][mask].clone()
        if samples[sample_index].group == 0:
            expected[0] = batch.sampler_logprobs[row][mask][0]
        assert torch.equal(batch.old_logprobs[row][mask], expected)

    # The learner scores nothing if all tokens were sampled by other weights.
    loop.updater.learner.score = None  # a call raises TypeError
    samples = [replace(sample, versions=(7,) * len(sample.versions)) for sample in samples]
    ((batch,),) = loop.updater.prepare([samples], loop.progress.rollout)
    assert torch.equal(batch.old_logprobs, batch.sampler_logprobs)


def test_rollouts_without_a_training_signal_skip_the_update_and_end_the_run_at_max_idle(
    tiny, tmp_path
):
    loop = make_loop(
        tmp_path,
        tiny,
        reward=lambda completion, problem: 1.0,
        algorithm={"max_idle": 2},
        train={"rollouts": 5},
    )
    learner = loop.updater.learner
    initial_weights = {name: weight.clone() for name, weight in learner.weights()}
    loop.step()
    assert loop.journal.latest_metrics["update/made"] == 0
    assert loop.journal.latest_metrics["update/skipped"] == 1
    with pytest.raises(RunError, match="2 consecutive rollouts without an update"):
        loop.step()
    for name, weight in learner.weights():
        assert torch.equal(weight, initial_weights[name])


def test_dynamic_sampling_ends_the_run_after_max_rounds_and_records_its_samples(tiny, tmp_path):
    loop = make_loop(
        tmp_path,
        tiny,
        reward=lambda completion, problem: 0.0,
        algorithm={"no_signal": "resample", "max_rounds": 3},
    )
    with pytest.raises(
        RunError,
        match=r"12 groups in 3 rounds gave only 0 of 4 groups with right and wrong completions "
        r"\(12 have no reward above 0\)",
    ):
        loop.step()
    samples = (tmp_path / "samples" / "step-000001.jsonl").read_text().splitlines()
    assert len(samples) == 12 * 4


def verdict_reward(undecided_ids):
    """Returns a reward that is undecided for problems with these ids, as for bad gold answers."""

    def reward(completion, problem):
        if problem.id in undecided_ids:
            return Verdict(value="undecided", reason="gold answer: unreadable")
        is_even = completion.token_ids[0] % 2 == 0
        return Verdict(value="correct" if is_even else "wrong")

    return reward


def test_a_bad_gold_answer_excludes_its_completions_and_does_not_stop_the_run(tiny, tmp_path):
    loop = make_loop(tmp_path, tiny, reward=verdict_reward({"p5"}))
    loop.train()
    rows = loop.run.read_metrics()
    assert [row.get("undecided/gold_answer") for row in rows[1:]] == [None, 0.25, None]
    assert loop.progress.rollout == 3


def test_too_many_undecided_completions_stop_the_run_and_a_resume_continues_it(tiny, tmp_path):
    uninterrupted = make_loop(tmp_path / "a", tiny, reward=verdict_reward(set()))
    uninterrupted.train()

    first = make_loop(tmp_path / "b", tiny, reward=verdict_reward({"p4", "p6"}))
    message = r"8 of the rollout's 16 completions \(50\.0%\) .* The first one: problem p4, .*"
    with pytest.raises(TrainingStoppedError, match=message):
        first.train()
    assert first.progress.rollout == 1
    samples = (tmp_path / "b" / "samples" / "step-000002.jsonl").read_text()
    assert samples.count("gold answer: unreadable") == 8
    first.save()
    first.run._lock.close()
    resumed = make_loop(tmp_path / "b", tiny, resume=True, reward=verdict_reward(set()))
    resumed.train()
    expected = state_of(uninterrupted)
    actual = state_of(resumed)
    assert actual.metrics == expected.metrics
    for name, weight in expected.weights.items():
        assert torch.equal(weight, actual.weights[name])


def test_dynamic_sampling_reports_undecided_completions_before_missing_groups(tiny, tmp_path):
    loop = make_loop(
        tmp_path,
        tiny,
        reward=verdict_reward({f"p{i}" for i in range(40)}),
        algorithm={"no_signal": "resample", "max_rounds": 3},
    )
    with pytest.raises(TrainingStoppedError, match="48 of the rollout's 48 completions"):
        loop.step()


def test_a_group_with_verdicts_has_a_training_signal_only_if_the_verdicts_differ():
    def scored_group(values, rewards):
        verdicts = tuple(Verdict(value=value) if value else None for value in values)
        return ScoredGroup(group=None, rewards=rewards, parts=(), verdicts=verdicts, faults=())

    assert has_training_signal(scored_group(("correct", "wrong", "undecided"), (1.0, 0.0, None)))
    # Only the other rewards differ, for example a penalty for the length.
    all_correct = scored_group(("correct", "correct", "undecided"), (1.0, 0.5, None))
    assert not has_training_signal(all_correct)
    assert pass_rate(all_correct, None) == 1.0
    assert has_training_signal(scored_group((None, None), (1.0, 0.5)))
    # A reward without verdicts failed on one completion.
    assert has_training_signal(scored_group((None, None, "undecided"), (1.0, 0.5, None)))


def test_pass_rates_in_the_data_are_validated_only_if_the_config_filters_by_them(tiny, tmp_path):
    def take(position, count):
        return [
            Problem(id=f"p{i}", question="", answer="", source="t", meta={"pass_rate": 75})
            for i in range(position, position + count)
        ]

    make_loop(tmp_path / "a", tiny, take=take).step()
    with pytest.raises(UserError, match=r"problem p0: meta\.pass_rate is 75, expected a number"):
        make_loop(tmp_path / "b", tiny, take=take, algorithm={"pass_rate": [0.1, 0.9]}).step()


def test_a_rollout_without_a_training_signal_skips_the_update_despite_a_kl_loss(tiny, tmp_path):
    loop = make_loop(
        tmp_path, tiny, reward=lambda completion, problem: 1.0, algorithm={"kl_coef": 0.1}
    )
    loop.step()
    assert loop.journal.latest_metrics["update/made"] == 0
    assert loop.progress.num_idle == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_the_first_update_reference_and_policy_logprobs_are_bit_identical(
    tiny, tmp_path, dtype
):
    loop = make_loop(tmp_path, tiny, model={"dtype": dtype}, algorithm={"kl_coef": 0.1})
    batches = loop.updater._micro_batches(samples_of(collect_groups(loop)))
    policy_scores = loop.updater.learner.score(batches)
    reference_scores = loop.updater.learner.score(batches, reference=True)
    for policy, reference in zip(policy_scores, reference_scores, strict=True):
        assert torch.equal(policy.logprobs, reference.logprobs)


def test_reset_optimizer_clears_the_moments_and_the_step_counts(tiny, tmp_path):
    loop = make_loop(
        tmp_path, tiny, algorithm={"kl_coef": 0.1, "reference_reset": 1, "reset_optimizer": True}
    )
    optimizer = loop.updater.learner._deepspeed_engine.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)  # ZeRO wraps the torch optimizer
    loop.step()
    for state in optimizer.state.values():
        for value in state.values():
            assert float(torch.as_tensor(value).abs().max()) == 0

    for state in optimizer.state.values():
        state["step"] = 7  # DeepSpeed's FusedAdam stores an integer, not a tensor
    loop.updater.learner.reset_reference(optimizer=True)
    for state in optimizer.state.values():
        assert state["step"] == 0


def test_problems_outside_the_pass_rate_range_are_not_drawn_again(tiny, tmp_path):
    problems = [Problem(id=f"p{i}", question="", answer="", source="t") for i in range(4)]
    drawn_ids = []

    def take(position, count):
        return [problems[(position + i) % 4] for i in range(count)]

    def reward(completion, problem):
        return float(problem.id in ("p0", "p2") or completion.token_ids[0] % 2 == 0)

    loop = make_loop(tmp_path, tiny, reward=reward, take=take, algorithm={"pass_rate": [0.0, 0.9]})
    sample = loop.rollouts.sample

    def recording_sample(problems, rollout, number, timer):
        drawn_ids.append([problem.id for problem in problems])
        return sample(problems, rollout, number, timer)

    loop.rollouts.sample = recording_sample
    loop.step()
    loop.rollouts.selection.pass_rates.update({"p0": 1.0, "p2": 1.0, "p1": 0.5, "p3": 0.5})
    loop.step()
    assert drawn_ids == [["p0", "p1", "p2", "p3"], ["p1", "p3", "p1", "p3"]]
    loop.rollouts.selection.pass_rates.update({"p1": 1.0, "p3": 1.0})
    with pytest.raises(RunError, match="excluded 10000 problems in a row"):
        loop.step()


def test_no_signal_drop_excludes_groups_without_a_signal_from_the_normalization(tiny, tmp_path):
    def reward(completion, problem):
        return float(problem.id in ("p0", "p1") or completion.token_ids[0] % 2 == 0)

    metrics = {}
    for no_signal in ("keep", "drop"):
        loop = make_loop(
            tmp_path / no_signal, tiny, reward=reward, algorithm={"no_signal": no_signal}
        )
        loop.step()
        metrics[no_signal] = loop.journal.latest_metrics
    assert metrics["keep"]["group/used"] == 4
    assert metrics["drop"]["group/used"] <= 2
    assert metrics["drop"]["update/tokens"] < metrics["keep"]["update/tokens"]


def test_top_entropy_gives_an_advantage_to_that_share_of_the_tokens(tiny, tmp_path):
    loop = make_loop(
        tmp_path,
        tiny,
        reward=lambda completion, problem: float(sum(completion.token_ids)),
        algorithm={"top_entropy": 0.25},
    )
    update = loop.updater.learner.update
    micro_batches = []

    def recording_update(batches, on_batch):
        micro_batches.extend(batches)
        return update(batches, on_batch)

    loop.updater.learner.update = recording_update
    loop.step()
    has_advantage = torch.cat(
        [(batch.advantages != 0)[batch.token_mask] for batch in micro_batches]
    )
    assert float(has_advantage.float().mean()) == pytest.approx(0.25, abs=0.02)


def test_top_entropy_skips_the_update_without_a_training_signal(tiny, tmp_path):
    loop = make_loop(
        tmp_path, tiny, reward=lambda completion, problem: 1.0, algorithm={"top_entropy": 0.25}
    )
    loop.step()
    assert loop.journal.latest_metrics["update/made"] == 0
    assert loop.progress.num_idle == 1


def test_the_reference_is_the_initial_policy_until_a_reset_makes_it_the_current_one(tiny, tmp_path):
    loop = make_loop(tmp_path, tiny, algorithm={"kl_coef": 0.1, "reference_reset": 2})
    learner = loop.updater.learner
    initial = [weight.clone() for weight in learner._references[""].model.parameters()]
    loop.step()
    for weight, expected in zip(learner._references[""].model.parameters(), initial, strict=True):
        assert torch.equal(weight, expected)
    loop.step()
    policy = learner._policy.model.parameters()
    for weight, expected in zip(learner._references[""].model.parameters(), policy, strict=True):
        assert torch.equal(weight, expected)


def test_lora_changes_only_the_projections_and_its_reference_is_the_base_model(tiny, tmp_path):
    loop = make_loop(tmp_path, tiny, **LORA)
    loop.step()
    base_weights = dict(models.load_model(tiny(), "packed").named_parameters())
    changed = {
        name
        for name, weight in loop.updater.learner.weights()
        if not torch.equal(weight, base_weights[name])
    }
    projections = {name for name in base_weights if "_proj" in name and not name.endswith("bias")}
    assert changed == projections
    loop.step()
    assert loop.journal.latest_metrics["kl/ref"] > 0


@pytest.mark.parametrize(
    ("dtype", "entry", "lowest", "highest"),
    [("float32", 1e-5, 0.99, 1.01), ("bfloat16", 1e-5, 0, 0.1), ("bfloat16", 1e-2, 0.9, 1.1)],
)
def test_the_share_of_a_lora_adapter_that_survives_its_merge_is_measured(
    tiny, tmp_path, dtype, entry, lowest, highest
):
    model = {**LORA["model"], "dtype": dtype}
    loop = make_loop(tmp_path, tiny, **(LORA | {"model": model, "learner": {"zero_stage": 1}}))
    learner = loop.updater.learner
    assert learner.merged_share() is None  # the adapters change nothing yet
    for layer in lora.adapted_layers(learner._policy.model).values():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(layer.lora_B["default"].weight.shape, generator=generator)
        layer.lora_B["default"].weight.data.copy_(noise)
        change = layer.get_delta_weight("default")
        layer.lora_B["default"].weight.data *= entry / change.abs().mean()
    assert lowest <= learner.merged_share() <= highest


def test_the_measured_adapters_include_every_kind_of_projection():
    # 32 layers with 7 projections each.
    measured = lora._measured(range(7 * 32))
    assert len(measured) == lora.MEASURED_LAYERS
    assert {index % 7 for index in measured} == set(range(7))


def test_peft_loads_a_saved_lora_adapter(tiny, tmp_path):
    import peft

    loop = make_loop(tmp_path, tiny, **LORA)
    loop.step()
    loop.updater.learner.save_adapter(tmp_path / "adapter")
    base = models.load_model(tiny(), "eager")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    merged_weights = dict(merged.named_parameters())
    for name, weight in loop.updater.learner.weights():
        assert torch.allclose(weight, merged_weights[name], atol=1e-6)


@pytest.mark.parametrize("kind", ["tiny-qwen3-moe", "tiny-deepseek-v3"])
def test_mixtures_of_experts_send_the_weight_names_of_the_hub_and_keep_a_frozen_router(
    tiny, tmp_path, kind
):
    loop = make_loop(tmp_path, tiny, kind=kind, model={"freeze_router": True})
    initial_weights = load_file(tiny(kind) / "model.safetensors")
    loop.step()
    assert loop.engine.weights.keys() == initial_weights.keys()
    unchanged = {
        name
        for name, weight in loop.engine.weights.items()
        if torch.equal(weight, initial_weights[name])
    }
    routers = {name for name in initial_weights if ".mlp.gate." in name}
    assert routers
    assert unchanged == routers


def test_the_balance_loss_is_that_of_the_switch_transformer_and_trains_the_router(tiny, tmp_path):
    kind = "tiny-qwen3-moe"
    without_loss = make_loop(tmp_path / "a", tiny, kind=kind, model={"router_aux_coef": 0.0})
    with_loss = make_loop(tmp_path / "b", tiny, kind=kind, model={"router_aux_coef": 10.0})
    without_loss.step()
    with_loss.step()
    assert "router/balance" not in without_loss.journal.latest_metrics
    # With 2 of 4 experts per token, the loss is 2 if the load is balanced, and at most 4.
    assert 2 <= with_loss.journal.latest_metrics["router/balance"] < 4
    routers = [name for name in with_loss.engine.weights if ".mlp.gate." in name]
    assert any(
        not torch.equal(with_loss.engine.weights[name], without_loss.engine.weights[name])
        for name in routers
    )


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("tiny-qwen2", {"freeze_router": True}, "a qwen2 model has no router"),
        ("tiny-deepseek-v3", {"router_aux_coef": 0.1}, "balances its experts without a loss"),
    ],
)
def test_router_options_that_do_not_apply_to_a_model_are_errors(
    tiny, tmp_path, kind, model, message
):
    with pytest.raises(UserError, match=message):
        make_loop(tmp_path, tiny, kind=kind, model=model)
