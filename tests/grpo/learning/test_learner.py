"""The learner against plain torch.

Logprobs, the AdamW update, and a save that continues bit for bit, for every ZeRO stage and dtype.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_config
from training_samples import COMBINATIONS, batches, samples

from grpo import config as configs
from grpo.learning import models
from grpo.learning.batch import token_weights
from grpo.learning.deepspeed_setup import learning_rate
from grpo.learning.learner import Learner
from grpo.learning.policy import HeadOptions, Policy
from grpo.losses.grpo import loss
from grpo.types import RunError, Sample


def naive_logprobs(model, row, temperature=1.0):
    ids = torch.tensor([row.token_ids])
    logits = model(input_ids=ids).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0][row.prompt_length - 1 :]


@pytest.mark.parametrize("kind", models.TINY)
def test_logprobs_and_entropy_equal_transformers_at_a_temperature(tiny, kind):
    model = models.load_model(tiny(kind), "eager")
    rows = samples()
    (batch,) = batches(rows, 10_000)
    with torch.no_grad():
        policy = Policy(model, HeadOptions(temperature=0.7, chunk_tokens=16))
        logprobs, entropies, *_ = policy(batch)
        for place, i in enumerate(batch.index):
            assert torch.allclose(
                logprobs[place][batch.token_mask[place]],
                naive_logprobs(model, rows[i], 0.7),
                atol=1e-5,
            )
        logits = (
            model(input_ids=torch.tensor([rows[batch.index[0]].token_ids])).logits[0, :-1] / 0.7
        )
        expected = torch.distributions.Categorical(logits=logits).entropy()[
            rows[batch.index[0]].prompt_length - 1 :
        ]
    assert torch.allclose(entropies[0][batch.token_mask[0]], expected, atol=1e-5)


@pytest.mark.parametrize("float32_head", [False, True])
def test_logprobs_and_entropies_have_the_gradients_of_plain_autograd(tiny, float32_head):
    model = models.load_model(tiny(), "eager")
    rows = samples()
    (batch,) = batches(rows, 10_000)
    head = HeadOptions(temperature=0.7, chunk_tokens=7, float32=float32_head, entropy_gradient=True)
    logprobs, entropies, *_ = Policy(model, head)(batch)
    weights = torch.rand(2, *logprobs.shape, generator=torch.Generator().manual_seed(0))
    (weights[0] * logprobs - 3 * weights[1] * entropies).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for place, i in enumerate(batch.index):
        mask = batch.token_mask[place]
        logits = (
            model(input_ids=torch.tensor([rows[i].token_ids])).logits[0, :-1][
                rows[i].prompt_length - 1 :
            ]
            / 0.7
        )
        own = logits.log_softmax(-1)
        picked = own.gather(1, torch.tensor(rows[i].token_ids[rows[i].prompt_length :])[:, None])[
            :, 0
        ]
        (
            weights[0, place][mask] * picked
            + 3 * weights[1, place][mask] * (own.exp() * own).sum(-1)
        ).sum().backward()
    assert all(
        torch.allclose(found[name], parameter.grad, atol=1e-4)
        for name, parameter in model.named_parameters()
    )


@pytest.mark.parametrize(("stage", "dtype"), COMBINATIONS)
def test_update_equals_plain_adamw_and_a_checkpoint_continues_it_bit_for_bit(
    tiny, tmp_path, stage, dtype
):
    """Three updates with clipping, weight decay and warm-up, each split differently.

    bfloat16 is compared loosely.
    """
    settings = {
        "lr": 1e-2,
        "eps": 1e-3,
        "weight_decay": 0.1,
        "warmup_updates": 2,
        "max_grad_norm": 0.5,
        "zero_stage": stage,
    }
    config = tiny_config(tmp_path, tiny(), model={"dtype": dtype}, learner=settings)
    reference = models.load_model(tiny(), "eager")
    learner = Learner(models.load_model(tiny(), "packed"), config, loss)
    rows = samples()
    groups = [
        {
            "params": [p for p in reference.parameters() if (p.ndim >= 2) == wide],
            "weight_decay": 0.1 * wide,
        }
        for wide in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)
    for update, budget in enumerate((10_000, 100, 40)):
        report = learner.update(batches(rows, budget))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (update + 1) / 2)
        value = torch.zeros(())
        for row, weight in zip(rows, token_weights(rows, "sequence", 20), strict=True):
            logprobs = naive_logprobs(reference, row)
            value = (
                value
                - weight
                * (torch.exp(logprobs - logprobs.detach()) * torch.tensor(row.advantages)).sum()
            )
        optimizer.zero_grad()
        value.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5))
        optimizer.step()
        assert report["policy/grad_norm"] == pytest.approx(
            norm, rel=1e-4 if dtype == "float32" else 0.05
        )
        assert report["policy/lr"] == pytest.approx(1e-2 * min(1.0, (update + 1) / 2))
        assert report["loss"] == pytest.approx(float(value), abs=1e-5)
    expected = dict(reference.named_parameters())
    for name, weight in learner.weights():
        assert torch.allclose(
            weight.float(), expected[name], atol=2e-5 if dtype == "float32" else 2e-2
        ), name
    learner.save(tmp_path / "saved")
    learner.update(batches(rows, 100))
    after = {name: weight.clone() for name, weight in learner.weights()}
    learner.load(tmp_path / "saved")
    assert learner.updates == 3
    learner.update(batches(rows, 100))
    assert all(torch.equal(after[name], weight) for name, weight in learner.weights())


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_gradient_checkpointing_changes_no_gradient(tiny, tmp_path, attention):
    after = []
    for checkpointing in (False, True):
        config = tiny_config(tmp_path, tiny(), model={"gradient_checkpointing": checkpointing})
        learner = Learner(models.load_model(tiny(), attention), config, loss)
        report = learner.update(batches(samples(), 100))
        after.append(
            (
                report["policy/grad_norm"],
                {name: weight.clone() for name, weight in learner.weights()},
            )
        )
    assert learner._policy.model.is_gradient_checkpointing
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-6)
    assert all(
        torch.allclose(after[0][1][name], weight, atol=1e-6) for name, weight in after[1][1].items()
    )


def test_perturbed_changes_every_weight_and_puts_it_back_bit_for_bit(tiny, tmp_path):
    learner = Learner(models.load_model(tiny(), "eager"), tiny_config(tmp_path, tiny()), loss)
    before = {name: weight.clone() for name, weight in learner.weights()}
    with learner.perturbed(seed=3):
        for name, weight in learner.weights():
            assert float((weight - before[name]).abs().mean()) > 0.05 * float(
                before[name].abs().mean()
            ), name
    assert all(torch.equal(before[name], weight) for name, weight in learner.weights())


def test_an_interrupt_between_micro_batches_changes_nothing(tiny, tmp_path):
    learner = Learner(models.load_model(tiny(), "eager"), tiny_config(tmp_path, tiny()), loss)
    before = {name: weight.clone() for name, weight in learner.weights()}

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner.update(batches(samples(), 40), stop)
    assert learner.updates == 0
    assert all(torch.equal(before[name], weight) for name, weight in learner.weights())


@pytest.mark.parametrize(("stage", "dtype"), COMBINATIONS)
def test_an_update_that_is_not_finite_is_skipped_and_the_third_in_a_row_stops_the_run(
    tiny, tmp_path, stage, dtype
):
    config = tiny_config(tmp_path, tiny(), model={"dtype": dtype}, learner={"zero_stage": stage})
    learner = Learner(models.load_model(tiny(), "eager"), config, loss)
    learner.update(batches(samples(), 1000))
    before = {name: weight.clone() for name, weight in learner.weights()}
    bad = batches(
        [Sample(token_ids=(7, 8, 9), prompt_length=1, advantages=(float("nan"),) * 2)], 100
    )
    assert (
        learner.update(bad)["update/not_finite"] == 1
        and learner.update(bad)["update/not_finite"] == 1
    )
    assert all(torch.equal(before[name], weight) for name, weight in learner.weights())
    # and what comes next is learned from
    assert learner.update(batches(samples(), 1000))["update/not_finite"] == 0
    assert any(
        not torch.equal(before[name], weight) and weight.isfinite().all()
        for name, weight in learner.weights()
    )
    learner.update(bad), learner.update(bad)
    with pytest.raises(RunError, match=r"not finite or above .*, 3 times in a row"):
        learner.update(bad)


@pytest.mark.parametrize(("stage", "dtype"), COMBINATIONS)
def test_an_update_with_an_exploding_gradient_is_skipped_with_its_norm(
    tiny, tmp_path, stage, dtype
):
    config = tiny_config(
        tmp_path,
        tiny(),
        model={"dtype": dtype},
        learner={"zero_stage": stage, "skip_grad_norm": 100.0},
    )
    learner = Learner(models.load_model(tiny(), "eager"), config, loss)
    usual = learner.update(batches(samples(), 1000))
    before = {name: weight.clone() for name, weight in learner.weights()}
    large = [
        replace(sample, advantages=tuple(1e4 * value for value in sample.advantages))
        for sample in samples()
    ]
    skipped = learner.update(batches(large, 1000))
    assert (
        skipped["update/not_finite"] == 1
        and 100 < skipped["policy/grad_norm"] < 1e6 * usual["policy/grad_norm"]
    )
    assert all(torch.equal(before[name], weight) for name, weight in learner.weights())
    assert learner.update(batches(samples(), 1000))["update/not_finite"] == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_makes_the_same_updates(tiny, tmp_path, stage):
    ends = {}
    for offload in (False, True):
        settings = {
            "lr": 1e-2,
            "zero_stage": stage,
            "offload_optimizer": offload,
            "skip_grad_norm": 1000.0,
        }
        learner = Learner(
            models.load_model(tiny(), "eager"),
            tiny_config(tmp_path, tiny(), model={"dtype": "bfloat16"}, learner=settings),
            loss,
        )
        norms = [learner.update(batches(samples(), 1000))["policy/grad_norm"] for _ in range(3)]
        large = [
            replace(sample, advantages=tuple(1e4 * value for value in sample.advantages))
            for sample in samples()
        ]
        ends[offload] = [*norms, learner.update(batches(large, 1000))["update/not_finite"]]
    assert (
        ends[True] == pytest.approx(ends[False], rel=1e-3)
        and ends[True][-1] == 1
        and ends[True][0] != ends[True][1]
    )


def test_metrics_are_means_over_completion_tokens_whatever_the_split(tiny, tmp_path):
    learner = Learner(
        models.load_model(tiny(), "eager"),
        tiny_config(tmp_path, tiny(), learner={"lr": 1e-12}),
        loss,
    )
    whole, split = (
        learner.update(batches(samples(), 10_000)),
        learner.update(batches(samples(), 40)),
    )
    for name in ("policy/entropy", "mismatch/abs", "ratio/mean", "policy/grad_norm", "loss"):
        assert split[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


def test_no_operator_is_compiled(tmp_path):
    """DeepSpeed compiles operators under a file lock that a killed process does not release.

    All later processes would wait for it forever.
    """
    program = (
        "from grpo.learning.deepspeed_setup import init_deepspeed; "
        "init_deepspeed(); print('joined')"
    )
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    environment |= {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "joined" in done.stdout and not list(tmp_path.iterdir()), done.stderr


def test_learning_rate_golden_numbers():
    settings = configs.Learner(lr=1.0, warmup_updates=2, schedule="cosine", min_lr_ratio=0.1)
    # warm-up 1/2, 1; then cosine over 8 updates from 1 to 0.1: update 6 is half way, 0.1 + 0.9 *
    # 0.5
    assert [learning_rate(settings, update, 10) for update in (0, 1, 2, 6)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.55]
    )
    linear = configs.Learner(lr=1.0, schedule="linear")
    assert [learning_rate(linear, update, 4) for update in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert learning_rate(configs.Learner(lr=1.0, min_lr_ratio=0.5), 3, 4) == 1.0
