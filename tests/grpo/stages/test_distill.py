"""Distillation.

Divergences against NumPy, the soft update against plain torch, and each of the three ways as a
whole run.
"""

import json

import numpy as np
import pytest
import torch
from random_loop import make_loop
from stage_configs import distill_config
from tiny_models import tiny_config
from whole_runs import rows, run

from grpo import config as configs
from grpo.config import DistillConfig, Soft
from grpo.learning import models
from grpo.learning.batch import micro_batches, token_weights
from grpo.learning.divergence import divergence, top_divergence
from grpo.learning.learner import Learner
from grpo.losses.cross_entropy import loss
from grpo.types import Sample, UserError


def probabilities(logits, temperature):
    exponents = np.exp(logits / temperature - (logits / temperature).max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("kind", "beta"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)]
)
def test_divergences_equal_numpy(kind, beta, temperature):
    student, teacher = np.random.default_rng(0).normal(size=(2, 6, 11)) * 3
    s, t = probabilities(student, temperature), probabilities(teacher, temperature)

    def kl(p, q):
        return (p * np.log(p / q)).sum(-1)

    m = beta * t + (1 - beta) * s
    expected = {
        "forward_kl": kl(t, s),
        "reverse_kl": kl(s, t),
        "jsd": beta * kl(t, m) + (1 - beta) * kl(s, m),
    }[kind]
    found = divergence(torch.tensor(student), torch.tensor(teacher), kind, temperature, beta)
    assert np.allclose(found.numpy(), expected, atol=1e-5)
    # a vocabulary padded to another size
    padded = torch.nn.functional.pad(torch.tensor(teacher), (0, 3), value=5.0)
    assert torch.allclose(divergence(torch.tensor(student), padded, kind, temperature, beta), found)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_likeliest_tokens_and_the_rest_come_within_a_thousandth_of_the_whole_divergence(kind):
    """Of language models.

    32 tokens that hold nearly all, a long tail of the rest in which student and teacher differ too.
    """
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(200, 5000, generator=generator) * 4
    student, teacher = (
        common + torch.randn(200, 5000, generator=generator) * 0.3 for _ in range(2)
    )
    whole = divergence(student, teacher, kind, 1.0)
    for k, within in ((512, 1e-3), (64, 1e-2)):
        logprobs, ids = teacher.log_softmax(-1).topk(k)
        found = top_divergence(student, ids, logprobs, kind)
        assert bool((found <= whole + 1e-5).all()) and float((found - whole).abs().mean()) < within
    logprobs, ids = teacher.log_softmax(-1).topk(5000)
    assert torch.allclose(top_divergence(student, ids, logprobs, kind), whole, atol=1e-5)


def texts(count=6):
    generator = torch.Generator().manual_seed(1)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    made = []
    for _ in range(count):
        prompt, target = integer(2, 6), integer(1, 12)
        ids = torch.randint(7, 200, (prompt + target,), generator=generator).tolist()
        made.append(Sample(token_ids=tuple(ids), prompt_length=prompt, advantages=(0.3,) * target))
    return made


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_a_soft_update_has_the_gradient_of_plain_torch_whatever_the_split(tiny, tmp_path, kind):
    soft = Soft(divergence=kind, temperature=2.0, soft_weight=0.7, hard_weight=0.3, updates=5)
    teacher_dir = tiny(intermediate_size=128)
    made = texts()
    student, teacher = models.load_model(tiny(), "eager"), models.load_model(teacher_dir, "eager")
    value, tokens = torch.zeros(()), sum(sample.completion_length for sample in made)
    for sample in made:
        ids = torch.tensor([sample.token_ids])
        own, its = (
            model(input_ids=ids).logits[0, sample.prompt_length - 1 : -1]
            for model in (student, teacher)
        )
        picked = own.log_softmax(-1).gather(1, ids[0, sample.prompt_length :, None])[:, 0]
        value = (
            value
            + (0.7 * 4 * divergence(own, its.detach(), kind, 2.0) - 0.3 * picked).sum() / tokens
        )
    value.backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in student.parameters()]))
    for budget, attention in ((1000, "packed"), (20, "packed"), (40, "eager")):
        config = tiny_config(tmp_path, tiny(), learner={"lr": 1e-12})
        learner = Learner(
            models.load_model(tiny(), attention),
            config,
            loss,
            models.load_model(teacher_dir, attention),
            soft=soft,
        )
        batches = micro_batches(
            made, token_weights(made, "token", 20), max_tokens=budget, packed=attention == "packed"
        )
        report = learner.update(batches)
        assert report["loss"] == pytest.approx(float(value), rel=1e-4)
        assert report["policy/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_different_vocabularies_are_refused_with_the_way_out(tiny, tmp_path):
    tokenizer = models.load_tokenizer(tiny())
    other = models.load_tokenizer(tiny())
    other.add_tokens(["<more>"])
    models.check_same_vocabulary(tokenizer, tokenizer)
    with pytest.raises(
        UserError,
        match=r"different vocabularies \(263 and 264 tokens.*Distill from texts.*`grpo collect`",
    ):
        models.check_same_vocabulary(tokenizer, other)


@pytest.mark.parametrize("layers", [{}, {1: 3, 2: 1}])
def test_hidden_states_are_matched_as_in_plain_torch_whatever_the_split(tiny, tmp_path, layers):
    made, teacher_dir = texts(), tiny(intermediate_size=128, num_hidden_layers=4, hidden_size=128)
    soft = Soft(soft_weight=0.5, hidden_weight=0.2, hidden_layers=layers, updates=5)
    pairs = layers or {1: 2, 2: 4}
    student, teacher = models.load_model(tiny(), "eager"), models.load_model(teacher_dir, "eager")

    def config():
        return tiny_config(tmp_path, tiny(), learner={"lr": 1e-12})

    learners = [
        (
            Learner(
                models.load_model(tiny(), attention),
                config(),
                loss,
                models.load_model(teacher_dir, attention),
                soft=soft,
            ),
            budget,
            attention,
        )
        for budget, attention in ((1000, "packed"), (40, "eager"))
    ]
    maps = {
        name: layer.weight.detach().clone()
        for name, layer in learners[0][0]._policy.projections.items()
    }
    assert list(maps) == [f"{m}_{n}" for m, n in pairs.items()]
    value, tokens = torch.zeros(()), sum(sample.completion_length for sample in made)
    for sample in made:
        ids, span = torch.tensor([sample.token_ids]), slice(sample.prompt_length - 1, -1)
        own, its = (model(input_ids=ids, output_hidden_states=True) for model in (student, teacher))
        picked = (
            own.logits[0, span]
            .log_softmax(-1)
            .gather(1, ids[0, sample.prompt_length :, None])[:, 0]
        )
        whole = divergence(own.logits[0, span], its.logits[0, span].detach(), "forward_kl", 1.0)
        value = value + (0.5 * whole - 0.3 * picked).sum() / tokens
        for m, n in pairs.items():
            error = (
                own.hidden_states[m][0, span] @ maps[f"{m}_{n}"].T
                - its.hidden_states[n][0, span].detach()
            )
            value = value + 0.2 * error.square().mean(-1).sum() / len(pairs) / tokens
    value.backward()
    gradient = dict(student.named_parameters())["model.layers.0.mlp.up_proj.weight"].grad
    for learner, budget, attention in learners:
        seen = []
        own = dict(learner._policy.model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
        own.register_hook(lambda grad, seen=seen: seen.append(grad.clone()))
        report = learner.update(
            micro_batches(
                made,
                token_weights(made, "token", 20),
                max_tokens=budget,
                packed=attention == "packed",
            )
        )
        assert report["loss"] == pytest.approx(float(value), rel=1e-4)
        assert torch.allclose(torch.stack(seen).sum(0), gradient, atol=1e-6)
        assert not any("project" in name for name, _ in learner.weights())


def test_a_layer_that_is_not_there_is_told(tiny, tmp_path):
    soft = Soft(hidden_weight=1.0, hidden_layers={9: 1}, updates=1)
    with pytest.raises(UserError, match=r"\{9: 1\} names a layer .* student has layers 1 to 2"):
        Learner(
            models.load_model(tiny(), "eager"),
            tiny_config(tmp_path, tiny()),
            loss,
            models.load_model(tiny(), "eager"),
            soft=soft,
        )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"way": "soft", "soft": {"updates": 1, "teacher_topk": 8, "temperature": 2.0}},
            "teacher_topk needs temperature=1 and hidden_weight=0",
        ),
        ({"way": "soft"}, "way=soft needs the section soft"),
        ({"way": "sequence", "collect": {"problems": 1}}, "way=sequence needs the section sft"),
        (
            {"way": "soft", "soft": {"updates": 1}, "model": {"path": "tiny-qwen2"}},
            "model.teacher: missing",
        ),
        (
            {
                "way": "sequence",
                "collect": {"problems": 1},
                "sft": {"updates": 1, "max_tokens": 9000},
            },
            "sft.max_tokens=9000",
        ),
        ({"way": "soft", "soft": {"updates": 1}, "algorithm": {"mismatch": "tis"}}, "algorithm"),
        (
            {
                "way": "on_policy",
                "train": {"rollouts": 1},
                "model": {"path": "a", "teacher": "b", "warm_start": "c"},
            },
            "fine-tune the student first",
        ),
    ],
)
def test_configs_that_cannot_work_are_refused(section, message):
    tree = {
        "run_dir": "x",
        "data": {"name": "arithmetic"},
        "model": {"path": "tiny-qwen2", "teacher": "tiny-qwen2"},
    }
    with pytest.raises(UserError, match=message):
        configs.parse(tree | section, kind=DistillConfig)


def test_soft_targets_draw_the_student_to_its_teacher_and_resume_bit_for_bit(tiny, tmp_path):
    soft = {"updates": 8, "batch_size": 8, "max_tokens": 96, "hard_weight": 0.1}
    config = distill_config(tmp_path, tiny, way="soft", soft=soft, checkpoint={"every": 4})
    run(config, command="distill")
    metrics = rows(tmp_path / "run")
    assert metrics[-1]["policy/divergence"] < 0.8 * metrics[0]["policy/divergence"]
    final = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    for name in ("final/model.safetensors", "checkpoints/step-000008/state.json"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "checkpoints" / "step-000008").rename(tmp_path / "gone")
    run(config, "--resume", command="distill")
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == final
    assert [row["update"] for row in rows(tmp_path / "run")] == list(range(1, 9))


def test_a_text_that_does_not_fit_is_told_before_a_model_is_loaded(tiny, tmp_path):
    config = distill_config(
        tmp_path, tiny, way="soft", soft={"updates": 3, "batch_size": 2, "max_tokens": 8}
    )
    assert "more than soft.max_tokens=8" in run(config, command="distill", code=2)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_without_gold_answers_on_policy_distillation_uses_every_completion(tiny, tmp_path):
    def undecided(completion, problem):
        return None

    teacher = {"model": {"teacher": "another"}, "algorithm": {"preset": "on_policy_distill"}}
    loop = make_loop(tmp_path, tiny, reward=undecided, **teacher)
    loop.step()
    assert (
        loop.journal.latest["update/made"] == 1
        and loop.journal.latest["update/tokens"] == loop.journal.latest["completion/tokens"]
    )


@pytest.mark.engine
def test_distillation_by_text_collects_from_the_teacher_and_teaches_the_student(tiny, tmp_path):
    sections = {
        "collect": {"problems": 4, "samples": 4, "chunk": 4, "format": False},
        "rewards": {"finished": 1.0},
        "sft": {"updates": 2, "batch_size": 2, "max_tokens": 96},
        "prompt": {"template": "plain", "max_tokens": 48, "stop": list("etao")},
    }
    config = distill_config(tmp_path, tiny, way="sequence", **sections)
    # a random teacher writes no thoughts: said at the first trace
    errors = run(config, command="distill", code=2)
    assert "no thoughts" in errors and (tmp_path / "run" / "collect" / "traces.jsonl").exists()
    traces = tmp_path / "run" / "collect" / "traces.jsonl"
    rows_of = [json.loads(line) for line in traces.read_text().splitlines()]
    fixed = [
        {
            "id": row["id"],
            "question": row["question"],
            "solution": "<think>1</think> <answer>2</answer>",
        }
        for row in rows_of
    ]
    traces.write_text("".join(json.dumps(row) + "\n" for row in fixed))
    run(config, "--resume", command="distill")  # what is collected is not collected again
    assert (tmp_path / "run" / "sft" / "final" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["final"] == "sft/final"


@pytest.mark.engine
def test_on_policy_the_student_comes_nearer_to_its_teacher(tiny, tmp_path):
    sections = {
        "train": {"rollouts": 6, "problems": 8, "group_size": 8},
        "eval": {"every": 0},
        "rewards": {"finished": 1.0},
    }
    run(
        distill_config(
            tmp_path,
            tiny,
            way="on_policy",
            learner={"lr": 5e-3, "zero_stage": 1, "micro_batch_tokens": 512},
            **sections,
        ),
        command="distill",
    )
    distances = [row["kl/ref"] for row in rows(tmp_path / "run") if "kl/ref" in row]
    assert len(distances) == 6 and distances[-1] < 0.9 * distances[0]
