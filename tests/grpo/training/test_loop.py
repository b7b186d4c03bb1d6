"""The loop with a real learner and an engine that draws tokens at random.

Every preset trains and resumes bit for bit, and what the sampling schemes do with groups. (With the
real engine: tests/grpo/stages/test_train.py and tests/slow.)
"""

import json
from dataclasses import replace

import pytest
import torch
from random_loop import make_loop

from grpo.config.presets import PRESETS
from grpo.experience.selection import has_training_signal, pass_rate
from grpo.learning import models
from grpo.learning.advantages import advantages, lengths, to_samples
from grpo.run.display import Timer
from grpo.types import Problem, RunError, ScoredGroup, UserError, Verdict


def state(loop):
    rows = [
        json.loads(line)
        for line in loop.run.metrics.read_text().splitlines()
        if "reward/mean" in line
    ]
    kept = {
        key: value
        for key, value in rows[-1].items()
        if not key.startswith(("time/", "bound/", "idle/"))
        and "seconds" not in key
        and "per_s" not in key
    }
    return (
        kept,
        {name: weight.clone() for name, weight in loop.updater.learner.weights()},
        loop.rollouts.selection.state(),
    )


@pytest.mark.parametrize("extra", [*PRESETS, "everything", "lora"])
def test_two_rollouts_and_a_resume_equal_three_bit_for_bit(tiny, tmp_path, extra):
    sections = (
        {"algorithm": {"preset": extra}, "train": {"rollouts": 3, "problems": 4, "group_size": 4}}
        if extra in PRESETS
        else SPECIAL[extra]
    )
    sections = {"algorithm": None} | sections  # not the tests' own kl_coef
    if extra == "on_policy_distill":
        sections |= {"model": {"teacher": "another"}}
    straight = make_loop(tmp_path / "a", tiny, **sections)
    straight.train()
    first = make_loop(tmp_path / "b", tiny, **sections)
    first.step()
    first.step()
    first.save()
    first.run._lock.close()
    second = make_loop(tmp_path / "b", tiny, resume=True, **sections)
    second.train()
    ours, theirs = state(straight), state(second)
    assert ours[0] == theirs[0] and ours[2] == theirs[2]
    assert all(torch.equal(weight, theirs[1][name]) for name, weight in ours[1].items())
    assert any(
        not torch.equal(weight, first.engine.weights[name]) for name, weight in theirs[1].items()
    )
    assert ours[0]["update/made"] > 0 and ours[0]["policy/grad_norm"] > 0


SPECIAL = {
    "everything": {
        "train": {
            "rollouts": 3,
            "problems": 4,
            "group_size": 4,
            "updates_per_rollout": 2,
            "epochs": 2,
        },
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
        },
    },
    "lora": {
        "model": {"lora": {"rank": 4}},
        "algorithm": {"kl_coef": 0.1},
        "learner": {"lr": 1e-2, "zero_stage": 1},
    },
}


def test_dynamic_sampling_carries_what_is_left_and_uses_every_accepted_group_once(tiny, tmp_path):
    loop = make_loop(
        tmp_path,
        tiny,
        algorithm={"no_signal": "resample"},
        train={"rollouts": 12, "problems": 4, "group_size": 2},
    )
    used, accepted, carried = [], [], []
    collect = loop.rollouts.selection.collect

    def watched(sample):
        selected = collect(sample)
        accepted.extend(
            scored for scored in selected.sampled if max(scored.rewards) != min(scored.rewards)
        )
        used.extend(selected.used)
        carried.append(len(loop.rollouts.selection.carried))
        assert len(selected.used) == 4
        return selected

    loop.rollouts.selection.collect = watched
    loop.train()
    assert any(carried), "this seed shows nothing"
    assert [id(scored) for scored in accepted] == [
        id(scored) for scored in [*used, *loop.rollouts.selection.carried]
    ]


def test_carried_groups_have_the_samplers_logprobs_as_old_ones(tiny, tmp_path):
    loop = make_loop(tmp_path, tiny, algorithm={"no_signal": "resample"})
    _, used = loop.rollouts.selection.collect(
        lambda problems, number: loop.rollouts.sample(problems, 0, number, Timer())
    )
    samples = to_samples(
        used, advantages([scored.rewards for scored in used], lengths(used), "none")
    )
    now = loop.progress.rollout + 1
    assert all(set(sample.versions) == {now} for sample in samples) and all(
        len(sample.versions) > 1 for sample in samples
    )
    samples = [
        replace(sample, versions=(7, *sample.versions[1:])) if sample.group == 0 else sample
        for sample in samples
    ]
    ((batch,),) = loop.updater.prepare([samples], loop.progress.rollout)
    (scored,) = loop.updater.learner.score([batch])
    for place, i in enumerate(batch.index):
        mask = batch.token_mask[place]
        expected = scored[0][place][mask].clone()
        if samples[i].group == 0:  # its first token was made by other weights, the rest by today's
            expected[0] = batch.sampler_logprobs[place][mask][0]
        assert torch.equal(batch.old_logprobs[place][mask], expected)
    loop.updater.learner.score = None  # of samples that are all older there is nothing to score
    older = [replace(sample, versions=(7,) * len(sample.versions)) for sample in samples]
    ((batch,),) = loop.updater.prepare([older], loop.progress.rollout)
    assert torch.equal(batch.old_logprobs, batch.sampler_logprobs)


def test_all_groups_without_signal_skip_the_update_count_it_and_stop_by_rule(tiny, tmp_path):
    loop = make_loop(
        tmp_path, tiny, reward=lambda *_: 1.0, algorithm={"max_idle": 2}, train={"rollouts": 5}
    )
    before = {name: weight.clone() for name, weight in loop.updater.learner.weights()}
    loop.step()
    assert loop.journal.latest["update/made"] == 0 and loop.journal.latest["update/skipped"] == 1
    with pytest.raises(RunError, match="2 consecutive rollouts without an update"):
        loop.step()
    assert all(torch.equal(before[name], weight) for name, weight in loop.updater.learner.weights())


def test_dynamic_sampling_gives_up_with_an_error_that_says_what_it_saw(tiny, tmp_path):
    loop = make_loop(
        tmp_path, tiny, reward=lambda *_: 0.0, algorithm={"no_signal": "resample", "max_rounds": 3}
    )
    with pytest.raises(
        RunError,
        match=r"12 groups in 3 rounds gave only 0 of 4 groups with right and wrong completions "
        r"\(12 have no reward above 0\)",
    ):
        loop.step()
    # what it saw
    assert len((tmp_path / "samples" / "step-000001.jsonl").read_text().splitlines()) == 12 * 4


def test_dynamic_sampling_wants_right_and_wrong_completions_not_unequal_lengths():
    both, right = (
        [Verdict(value=value) for value in values]
        for values in (("correct", "wrong", "undecided"), ("correct", "correct", "undecided"))
    )

    def group(verdicts, rewards):
        return ScoredGroup(
            group=None, rewards=rewards, parts=(), verdicts=tuple(verdicts), faults=()
        )

    assert has_training_signal(group(both, (1.0, 0.0, None)))
    assert not has_training_signal(group(right, (1.0, 0.5, None)))
    assert has_training_signal(group([None] * 2, (1.0, 0.5)))
    assert pass_rate(group(right, (1.0, 0.5, None))) == 1.0


def test_a_pass_rate_in_the_data_counts_only_when_it_is_asked_for(tiny, tmp_path):
    def take(position, n):
        return [
            Problem(
                id=f"p{position + i}", question="", answer="", source="t", meta={"pass_rate": 75}
            )
            for i in range(n)
        ]

    make_loop(tmp_path / "a", tiny, take=take).step()
    with pytest.raises(UserError, match=r"problem p0: meta\.pass_rate is 75, expected a number"):
        make_loop(tmp_path / "b", tiny, take=take, algorithm={"pass_rate": [0.1, 0.9]}).step()


def test_without_a_signal_the_kl_does_not_update_alone(tiny, tmp_path):
    loop = make_loop(tmp_path, tiny, reward=lambda *_: 1.0, algorithm={"kl_coef": 0.1})
    loop.step()
    assert loop.journal.latest["update/made"] == 0 and loop.progress.num_idle == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_the_first_update_the_reference_is_the_policy_to_the_bit(tiny, tmp_path, dtype):
    loop = make_loop(tmp_path, tiny, model={"dtype": dtype}, algorithm={"kl_coef": 0.1})
    _, used = loop.rollouts.selection.collect(
        lambda problems, number: loop.rollouts.sample(problems, 0, number, Timer())
    )
    batches = loop.updater._micro_batches(
        to_samples(used, advantages([scored.rewards for scored in used], lengths(used), "none"))
    )
    for (own, _), (ref, _) in zip(
        loop.updater.learner.score(batches),
        loop.updater.learner.score(batches, reference=True),
        strict=True,
    ):
        assert torch.equal(own, ref)


def test_a_reset_optimizer_has_no_moments_and_no_steps_whatever_its_kind(tiny, tmp_path):
    loop = make_loop(
        tmp_path, tiny, algorithm={"kl_coef": 0.1, "reference_reset": 1, "reset_optimizer": True}
    )
    optimizer = getattr(
        loop.updater.learner._engine.optimizer, "optimizer", loop.updater.learner._engine.optimizer
    )
    loop.step()
    assert all(
        float(torch.as_tensor(value).abs().max()) == 0
        for state in optimizer.state.values()
        for value in state.values()
    )
    for state in optimizer.state.values():
        state["step"] = 7  # as DeepSpeed's FusedAdam keeps it
    loop.updater.learner.reset_reference(optimizer=True)
    assert all(state["step"] == 0 for state in optimizer.state.values())


def test_solved_problems_are_not_drawn_again(tiny, tmp_path):
    def solved(completion, problem):
        return float(problem.id in ("p0", "p2") or completion.token_ids[0] % 2 == 0)

    problems = [Problem(id=f"p{i}", question="", answer="", source="t") for i in range(4)]

    def take(position, n):
        return [problems[(position + i) % 4] for i in range(n)]

    loop = make_loop(
        tmp_path,
        tiny,
        reward=lambda c, p: 1.0 if p.id in ("p0", "p2") else solved(c, p),
        take=take,
        algorithm={"pass_rate": [0.0, 0.9]},
    )
    drawn = []
    loop.rollouts.selection.take = lambda position, n: take(position, n)
    sample = loop.rollouts.sample

    def watched(problems, rollout, number, timer):
        drawn.append([p.id for p in problems])
        return sample(problems, rollout, number, timer)

    loop.rollouts.sample = watched
    loop.step()
    loop.rollouts.selection.pass_rates |= {"p0": 1.0, "p2": 1.0, "p1": 0.5, "p3": 0.5}
    loop.step()
    assert drawn == [["p0", "p1", "p2", "p3"], ["p1", "p3", "p1", "p3"]]
    loop.rollouts.selection.pass_rates |= {"p1": 1.0, "p3": 1.0}
    with pytest.raises(RunError, match="exclude the last 10000 problems"):
        loop.step()


def test_no_signal_drop_leaves_such_groups_out_of_the_normaliser(tiny, tmp_path):
    def reward(completion, problem):
        return 1.0 if problem.id in ("p0", "p1") else float(completion.token_ids[0] % 2 == 0)

    tokens = {}
    for no_signal in ("keep", "drop"):
        loop = make_loop(
            tmp_path / no_signal, tiny, reward=reward, algorithm={"no_signal": no_signal}
        )
        loop.step()
        tokens[no_signal] = (
            loop.journal.latest["group/used"],
            loop.journal.latest["update/tokens"],
        )
    assert (
        tokens["keep"][0] == 4 and tokens["drop"][0] <= 2 and tokens["drop"][1] < tokens["keep"][1]
    )


def test_top_entropy_gives_an_advantage_to_that_share_of_tokens(tiny, tmp_path):
    loop = make_loop(
        tmp_path,
        tiny,
        reward=lambda completion, _: float(sum(completion.token_ids)),
        algorithm={"top_entropy": 0.25},
    )
    found = []
    update = loop.updater.learner.update
    loop.updater.learner.update = lambda batches, show: (
        found.extend(batches) or update(batches, show)
    )
    loop.step()
    chosen = torch.cat([(batch.advantages != 0)[batch.token_mask] for batch in found])
    assert float(chosen.float().mean()) == pytest.approx(0.25, abs=0.02)


def test_top_entropy_has_nothing_to_choose_from_without_a_signal(tiny, tmp_path):
    loop = make_loop(tmp_path, tiny, reward=lambda *_: 1.0, algorithm={"top_entropy": 0.25})
    loop.step()
    assert loop.journal.latest["update/made"] == 0 and loop.progress.num_idle == 1


def test_the_reference_is_the_policy_after_a_reset_and_before_it_the_start(tiny, tmp_path):
    loop = make_loop(tmp_path, tiny, algorithm={"kl_coef": 0.1, "reference_reset": 2})

    def reference():
        return [p.clone() for p in loop.updater.learner._reference.model.parameters()]

    start = reference()
    loop.step()
    assert all(torch.equal(a, b) for a, b in zip(start, reference(), strict=True))
    loop.step()
    assert all(
        torch.equal(a, b)
        for a, b in zip(loop.updater.learner._policy.model.parameters(), reference(), strict=True)
    )


def test_a_lora_reference_is_the_model_under_the_adapters(tiny, tmp_path):
    loop = make_loop(tmp_path, tiny, **SPECIAL["lora"])
    loop.step()
    base = dict(models.load_model(tiny(), "packed").named_parameters())
    changed = {
        name
        for name, weight in loop.updater.learner.weights()
        if not torch.equal(weight, base[name])
    }
    assert changed == {name for name in base if "_proj" in name and not name.endswith("bias")}
    loop.step()
    assert loop.journal.latest["kl/ref"] > 0


def test_a_lora_adapter_is_saved_as_peft_reads_it(tiny, tmp_path):
    import peft

    loop = make_loop(tmp_path, tiny, **SPECIAL["lora"])
    loop.step()
    loop.updater.learner.save_adapter(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        models.load_model(tiny(), "eager"), tmp_path / "adapter"
    ).merge_and_unload()
    theirs = dict(loaded.named_parameters())
    assert all(
        torch.allclose(weight, theirs[name], atol=1e-6)
        for name, weight in loop.updater.learner.weights()
    )


@pytest.mark.parametrize("kind", ["tiny-qwen3-moe", "tiny-deepseek-v3"])
def test_mixtures_of_experts_train_send_the_hubs_names_and_keep_a_frozen_router(
    tiny, tmp_path, kind
):
    from safetensors.torch import load_file

    loop = make_loop(tmp_path, tiny, kind=kind, model={"freeze_router": True})
    before = load_file(tiny(kind) / "model.safetensors")
    loop.step()
    assert loop.engine.weights.keys() == before.keys()
    same = {
        name for name, weight in loop.engine.weights.items() if torch.equal(weight, before[name])
    }
    routers = {name for name in before if ".mlp.gate." in name}
    assert routers and routers == same


def test_the_balance_loss_is_switch_transformers_and_reaches_the_router(tiny, tmp_path):
    loops = [
        make_loop(
            tmp_path / name,
            tiny,
            kind="tiny-qwen3-moe",
            model={"router_aux_coef": coef},
            reward=reward,
        )
        for name, coef, reward in [("a", 0.0, None), ("b", 10.0, None)]
    ]
    for loop in loops:
        loop.step()
    # 2 experts a token of 4: at least 2
    assert (
        "router/balance" not in loops[0].journal.latest
        and 2 <= loops[1].journal.latest["router/balance"] < 4
    )
    gates = [
        [w for name, w in loop.engine.weights.items() if ".mlp.gate." in name] for loop in loops
    ]
    assert any(not torch.equal(a, b) for a, b in zip(*gates, strict=True))


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("tiny-qwen2", {"freeze_router": True}, "a qwen2 has no router"),
        ("tiny-deepseek-v3", {"router_aux_coef": 0.1}, "balances its experts without a loss"),
    ],
)
def test_router_options_that_a_model_has_no_use_for_are_refused(
    tiny, tmp_path, kind, model, message
):
    with pytest.raises(UserError, match=message):
        make_loop(tmp_path, tiny, kind=kind, model=model)
