"""`grpo distill`: divergences, losses and gradients, and runs of the three values of `way`.

Divergences are compared with NumPy, losses and gradients with plain PyTorch.
"""

import json

import numpy as np
import pytest
import torch
from random_loop import make_loop
from stage_configs import SEQUENCE_SECTIONS, distill_config
from tiny_models import make_tiny_with, merging_tokenizer, tiny_config
from whole_runs import read_metrics, run_grpo

from grpo import config as configs
from grpo.config import DistillConfig, SoftTargetSettings
from grpo.learning import models
from grpo.learning.batch import micro_batches, token_weights
from grpo.learning.divergence import divergence, top_divergence
from grpo.learning.learner import Learner
from grpo.learning.policy import Reference
from grpo.losses.cross_entropy import loss
from grpo.types import Sample, UserError


def probabilities(logits, temperature):
    scaled = logits / temperature
    exponents = np.exp(scaled - scaled.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def numpy_divergence(student, teacher, kind, beta):
    """Returns the divergence of probabilities [N, V] per position."""
    if kind == "forward_kl":
        return kl(teacher, student)
    if kind == "reverse_kl":
        return kl(student, teacher)
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("kind", "beta"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)]
)
def test_divergences_equal_numpy(kind, beta, temperature):
    student, teacher = np.random.default_rng(0).normal(size=(2, 6, 11)) * 3
    expected = numpy_divergence(
        probabilities(student, temperature), probabilities(teacher, temperature), kind, beta
    )
    student_logits = torch.tensor(student)
    teacher_logits = torch.tensor(teacher)
    actual = divergence(student_logits, teacher_logits, kind, temperature, beta)
    assert np.allclose(actual.numpy(), expected, atol=1e-5)

    # The teacher's vocabulary is padded to another size. Only the common part counts.
    padded = torch.nn.functional.pad(teacher_logits, (0, 3), value=5.0)
    with_padding = divergence(student_logits, padded, kind, temperature, beta)
    assert torch.allclose(with_padding, actual)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_top_divergence_is_a_close_lower_bound_of_the_full_divergence(kind):
    """The distributions resemble those of language models.

    A few tokens have nearly all of the probability. Student and teacher also differ in the long
    tail.
    """
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(200, 5000, generator=generator) * 4
    student = common + torch.randn(200, 5000, generator=generator) * 0.3
    teacher = common + torch.randn(200, 5000, generator=generator) * 0.3
    full = divergence(student, teacher, kind, 1.0)
    teacher_logprobs = teacher.log_softmax(-1)

    for k, max_mean_error in ((512, 1e-3), (64, 1e-2)):
        top_logprobs, top_ids = teacher_logprobs.topk(k)
        top = top_divergence(student, top_ids, top_logprobs, kind)
        assert bool((top <= full + 1e-5).all())
        assert float((top - full).abs().mean()) < max_mean_error

    all_logprobs, all_ids = teacher_logprobs.topk(5000)
    assert torch.allclose(top_divergence(student, all_ids, all_logprobs, kind), full, atol=1e-5)


HARD_WEIGHT = 0.3  # of the cross-entropy of a completion token, stored as its advantage


def random_samples():
    """Returns six samples with prompts and completions of random tokens."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for _ in range(6):
        prompt_length = int(torch.randint(2, 6, (), generator=generator))
        completion_length = int(torch.randint(1, 12, (), generator=generator))
        num_tokens = prompt_length + completion_length
        ids = torch.randint(7, 200, (num_tokens,), generator=generator).tolist()
        sample = Sample(
            token_ids=tuple(ids),
            prompt_length=prompt_length,
            advantages=(HARD_WEIGHT,) * completion_length,
        )
        samples.append(sample)
    return samples


def prompt_and_completion_ids(sample):
    return torch.tensor([sample.token_ids])  # [1, tokens]


def completion_positions(sample):
    """Returns the positions whose logits predict the completion tokens."""
    return slice(sample.prompt_length - 1, -1)


def completion_logprobs(logits, sample):
    """Returns the logprobs of the completion tokens under logits [T, V]."""
    completion_ids = torch.tensor(sample.token_ids[sample.prompt_length :])
    return logits.log_softmax(-1).gather(1, completion_ids[:, None])[:, 0]


def make_batches(samples, *, max_tokens, attention):
    weights = token_weights(samples, "token", 20)
    return micro_batches(samples, weights, max_tokens=max_tokens, packed=attention == "packed")


def soft_loss(student, teacher, samples, kind):
    """Returns the mean loss per token: soft targets at temperature 2, and hard targets."""
    num_tokens = sum(sample.completion_length for sample in samples)
    total = torch.zeros(())
    for sample in samples:
        ids = prompt_and_completion_ids(sample)
        positions = completion_positions(sample)
        student_logits = student(input_ids=ids).logits[0, positions]
        teacher_logits = teacher(input_ids=ids).logits[0, positions].detach()
        # The weight of the soft targets is soft_weight x temperature^2 = 0.7 x 4.
        soft = 0.7 * 4 * divergence(student_logits, teacher_logits, kind, 2.0)
        hard = -HARD_WEIGHT * completion_logprobs(student_logits, sample)
        total = total + (soft + hard).sum() / num_tokens
    return total


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_gradient_of_soft_targets_equals_plain_torch_for_every_split(tiny, tmp_path, kind):
    settings = SoftTargetSettings(
        divergence=kind, temperature=2.0, soft_weight=0.7, hard_weight=HARD_WEIGHT, updates=5
    )
    teacher_dir = tiny(intermediate_size=128)
    samples = random_samples()
    student = models.load_model(tiny(), "eager")
    teacher = models.load_model(teacher_dir, "eager")
    expected_loss = soft_loss(student, teacher, samples, kind)
    expected_loss.backward()
    gradients = [parameter.grad for parameter in student.parameters()]
    expected_norm = float(torch.nn.utils.get_total_norm(gradients))

    for max_tokens, attention in ((1000, "packed"), (20, "packed"), (40, "eager")):
        learner = Learner(
            models.load_model(tiny(), attention),
            tiny_config(tmp_path, tiny(), learner={"lr": 1e-12}),
            loss,
            {"": Reference(models.load_model(teacher_dir, attention))},
            soft=settings,
        )
        report = learner.update(make_batches(samples, max_tokens=max_tokens, attention=attention))
        assert report["loss"] == pytest.approx(float(expected_loss), rel=1e-4)
        assert report["policy/grad_norm"] == pytest.approx(expected_norm, rel=1e-4)


def hidden_state_loss(student, teacher, samples, projections):
    """Returns the mean loss per token: hidden states, soft targets and hard targets.

    `projections` maps (student's layer, teacher's layer) to the weight of the projection.
    """
    num_tokens = sum(sample.completion_length for sample in samples)
    total = torch.zeros(())
    for sample in samples:
        ids = prompt_and_completion_ids(sample)
        positions = completion_positions(sample)
        student_output = student(input_ids=ids, output_hidden_states=True)
        teacher_output = teacher(input_ids=ids, output_hidden_states=True)
        student_logits = student_output.logits[0, positions]
        teacher_logits = teacher_output.logits[0, positions].detach()
        soft = 0.5 * divergence(student_logits, teacher_logits, "forward_kl", 1.0)
        hard = -HARD_WEIGHT * completion_logprobs(student_logits, sample)
        total = total + (soft + hard).sum() / num_tokens
        for (student_layer, teacher_layer), weight in projections.items():
            student_states = student_output.hidden_states[student_layer][0, positions]
            teacher_states = teacher_output.hidden_states[teacher_layer][0, positions].detach()
            error = (student_states @ weight.T - teacher_states).square().mean(-1)
            total = total + 0.2 * error.sum() / len(projections) / num_tokens
    return total


def up_projection(model):
    return dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"]


def record_gradients(parameter):
    """Returns a list. Every backward pass appends its gradient of the parameter."""
    gradients = []

    def record(gradient):
        gradients.append(gradient.clone())

    parameter.register_hook(record)
    return gradients


@pytest.mark.parametrize(
    ("hidden_layers", "layer_pairs"),
    [
        ({}, [(1, 2), (2, 4)]),  # the default for a student of 2 layers and a teacher of 4
        ({1: 3, 2: 1}, [(1, 3), (2, 1)]),
    ],
)
def test_gradient_of_hidden_states_equals_plain_torch_for_every_split(
    tiny, tmp_path, hidden_layers, layer_pairs
):
    teacher_dir = tiny(intermediate_size=128, num_hidden_layers=4, hidden_size=128)
    settings = SoftTargetSettings(
        soft_weight=0.5, hidden_weight=0.2, hidden_layers=hidden_layers, updates=5
    )

    def make_learner(attention):
        return Learner(
            models.load_model(tiny(), attention),
            tiny_config(tmp_path, tiny(), learner={"lr": 1e-12}),
            loss,
            {"": Reference(models.load_model(teacher_dir, attention))},
            soft=settings,
        )

    packed_learner = make_learner("packed")
    eager_learner = make_learner("eager")
    learner_projections = packed_learner._policy.projections
    assert list(learner_projections) == [f"{m}_{n}" for m, n in layer_pairs]
    projections = {}  # the same in both learners
    for pair, layer in zip(layer_pairs, learner_projections.values(), strict=True):
        projections[pair] = layer.weight.detach().clone()

    samples = random_samples()
    student = models.load_model(tiny(), "eager")
    teacher = models.load_model(teacher_dir, "eager")
    expected_loss = hidden_state_loss(student, teacher, samples, projections)
    expected_loss.backward()
    expected_gradient = up_projection(student).grad

    for learner, max_tokens, attention in (
        (packed_learner, 1000, "packed"),
        (eager_learner, 40, "eager"),
    ):
        gradients = record_gradients(up_projection(learner._policy.model))  # per micro-batch
        report = learner.update(make_batches(samples, max_tokens=max_tokens, attention=attention))
        assert report["loss"] == pytest.approx(float(expected_loss), rel=1e-4)
        assert torch.allclose(torch.stack(gradients).sum(0), expected_gradient, atol=1e-6)
        assert not any("project" in name for name, _ in learner.weights())


def test_missing_hidden_layer_raises(tiny, tmp_path):
    soft = SoftTargetSettings(hidden_weight=1.0, hidden_layers={9: 1}, updates=1)
    with pytest.raises(UserError, match=r"\{9: 1\} names a layer .* student has layers 1 to 2"):
        Learner(
            models.load_model(tiny(), "eager"),
            tiny_config(tmp_path, tiny()),
            loss,
            {"": Reference(models.load_model(tiny(), "eager"))},
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
def test_invalid_distill_config_raises(section, message):
    tree = {
        "run_dir": "x",
        "data": {"name": "arithmetic"},
        "model": {"path": "tiny-qwen2", "teacher": "tiny-qwen2"},
    }
    with pytest.raises(UserError, match=message):
        configs.parse(tree | section, kind=DistillConfig)


def models_with_different_vocabularies(tiny, path):
    """Returns the section `model` of a Llama with tokens of one byte, and a Qwen as its teacher."""
    texts = ["<think>7+5+0=12 </think><answer>432</answer>", "347+85="]
    tokenizer = merging_tokenizer(texts, vocabulary=300)
    make_tiny_with(tokenizer, path, "tiny-qwen2", seed=1)
    return {"path": str(tiny("tiny-llama")), "teacher": str(path), "dtype": "float32"}


@pytest.mark.parametrize("has_other_vocabulary", [False, True])
def test_soft_targets_reduce_the_divergence_and_a_resumed_run_ends_with_equal_weights(
    tiny, tmp_path, has_other_vocabulary
):
    run_dir = tmp_path / "run"
    sections = {
        "soft": {"updates": 8, "batch_size": 8, "max_tokens": 96, "hard_weight": 0.1},
        "checkpoint": {"every": 4},
    }
    if has_other_vocabulary:
        sections["model"] = models_with_different_vocabularies(tiny, tmp_path / "teacher")
    config = distill_config(tmp_path, tiny, way="soft", **sections)
    run_grpo(config, command="distill")
    metrics = read_metrics(run_dir)
    assert metrics[-1]["policy/divergence"] < 0.8 * metrics[0]["policy/divergence"]

    # Remove the results after update 4, so that the run resumes there.
    final_weights_file = run_dir / "final" / "model.safetensors"
    final_weights = final_weights_file.read_bytes()
    last_checkpoint = run_dir / "checkpoints" / "step-000008"
    final_weights_file.unlink()
    (last_checkpoint / "state.json").unlink()
    last_checkpoint.rename(tmp_path / "gone")
    run_grpo(config, "--resume", command="distill")
    assert final_weights_file.read_bytes() == final_weights
    assert [row["update"] for row in read_metrics(run_dir)] == list(range(1, 9))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("soft.temperature=2", "different vocabularies, which needs soft.temperature=1"),
        ("soft.teacher_topk=4", "needs soft.teacher_topk="),
        ("soft.hidden_weight=0.5", "needs soft.hidden_weight=0"),
    ],
)
def test_settings_that_need_one_vocabulary_raise(tiny, tmp_path, override, message):
    model = models_with_different_vocabularies(tiny, tmp_path / "teacher")
    soft = {"updates": 8, "batch_size": 8, "max_tokens": 96}
    config = distill_config(tmp_path, tiny, way="soft", soft=soft, model=model)
    assert message in run_grpo(config, override, command="distill", code=2)


def test_too_long_text_raises_before_a_model_is_loaded(tiny, tmp_path):
    soft = {"updates": 3, "batch_size": 2, "max_tokens": 8}
    config = distill_config(tmp_path, tiny, way="soft", soft=soft)
    assert "more than soft.max_tokens=8" in run_grpo(config, command="distill", code=2)
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("way", "learner", "lr"),
    [
        ({"way": "on_policy", "train": {"rollouts": 1}}, {}, 1e-6),
        ({"way": "on_policy", "train": {"rollouts": 1}}, {"lr": 1e-4}, 1e-4),
        ({"way": "soft", "soft": {"updates": 1}}, {}, 2e-5),
    ],
)
def test_on_policy_distillation_has_the_learning_rate_of_rl(tiny, tmp_path, way, learner, lr):
    path = distill_config(tmp_path, tiny, **way, learner=learner | {"zero_stage": 1})
    config = configs.load(str(path), kind=DistillConfig)
    assert config.learner.lr == lr
    for part in config.stage_configs().values():
        assert part.learner.lr == lr


def test_on_policy_distillation_can_compare_complete_distributions(tiny, tmp_path):
    way = {"way": "on_policy", "train": {"rollouts": 1}, "learner": {"zero_stage": 1}}
    path = distill_config(tmp_path, tiny, **way, on_policy_divergence="jsd")
    [train] = configs.load(str(path), kind=DistillConfig).stage_configs().values()
    assert train.algorithm.preset == "on_policy_distill_exact"
    assert train.algorithm.teacher_divergence == "jsd"
    soft = {"way": "soft", "soft": {"updates": 1}}
    path = distill_config(tmp_path, tiny, **soft, on_policy_divergence="jsd")
    with pytest.raises(UserError, match="on_policy_divergence has no effect with way=soft"):
        configs.load(str(path), kind=DistillConfig)


def test_on_policy_distillation_without_answers_uses_every_completion(tiny, tmp_path):
    def undecided(completion, problem):
        return None

    sections = {"model": {"teacher": "another"}, "algorithm": {"preset": "on_policy_distill"}}
    loop = make_loop(tmp_path, tiny, reward=undecided, **sections)
    loop.step()
    metrics = loop.journal.latest_metrics
    assert metrics["update/made"] == 1
    assert metrics["update/tokens"] == metrics["completion/tokens"]


@pytest.mark.engine
def test_sequence_distillation_trains_the_student_on_texts_of_the_teacher(tiny, tmp_path):
    run_dir = tmp_path / "run"
    config = distill_config(tmp_path, tiny, way="sequence", **SEQUENCE_SECTIONS)
    # The texts of a teacher with random weights have no thoughts, so the first trace is invalid.
    errors = run_grpo(config, command="distill", code=2)
    assert "no thoughts" in errors

    # Replace the solutions of the traces. The resumed run reads them and does not collect again.
    traces_file = run_dir / "collect" / "traces.jsonl"
    lines = []
    for line in traces_file.read_text().splitlines():
        trace = json.loads(line)
        trace = {
            "id": trace["id"],
            "question": trace["question"],
            "solution": "<think>1</think> <answer>2</answer>",
        }
        lines.append(json.dumps(trace) + "\n")
    traces_file.write_text("".join(lines))
    run_grpo(config, "--resume", command="distill")
    assert (run_dir / "sft" / "final" / "model.safetensors").exists()
    assert json.loads((run_dir / "manifest.json").read_text())["final"] == "sft/final"


@pytest.mark.engine
def test_on_policy_distillation_reduces_the_divergence_from_the_teacher(tiny, tmp_path):
    sections = {
        "train": {"rollouts": 6, "problems": 8, "group_size": 8},
        "learner": {"lr": 5e-3, "zero_stage": 1, "micro_batch_tokens": 512},
        "eval": {"every": 0},
        "rewards": {"finished": 1.0},
    }
    config = distill_config(tmp_path, tiny, way="on_policy", **sections)
    run_grpo(config, command="distill")
    divergences = [row["kl/ref"] for row in read_metrics(tmp_path / "run") if "kl/ref" in row]
    assert len(divergences) == 6
    assert divergences[-1] < 0.9 * divergences[0]
