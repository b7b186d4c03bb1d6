"""`grpo sft`: training rows, equality with plain PyTorch, LoRA, early stop, skipped updates."""

import json

import pytest
import torch
from safetensors.torch import load_file
from stage_configs import final_weights, sft_config
from whole_runs import read_metrics, run_grpo, write_config

from grpo import config as configs
from grpo.config import SftConfig
from grpo.config.model import RopeSettings
from grpo.data import arithmetic
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.learning.deepspeed_setup import learning_rate
from grpo.stages.problems import load_problems, make_mixture
from grpo.stages.sft import sft, training_rows
from grpo.stages.solutions import SolutionTexts
from grpo.types import Sample, UserError


def load_training_rows(config):
    tokenizer = models.load_tokenizer(config.model.path)
    prompts = Prompts(config.prompt, tokenizer)
    mixture = make_mixture(config.data, load_problems(config.data, "train", 0), prompts, 0)
    problems = mixture.take(0, config.sft.updates * config.sft.batch_size)
    return list(training_rows(problems, prompts, config.sft.max_tokens))


def test_lora_changes_the_projections_and_saves_the_merged_model_and_the_adapter(tiny, tmp_path):
    config = configs.parse(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(tiny()), "dtype": "float32", "lora": {"rank": 4}},
            "data": {"name": "arithmetic", "options": {"digits": 1}},
            "prompt": {"template": "plain", "max_tokens": 48},
            "sft": {"updates": 2, "batch_size": 2, "max_tokens": 96},
            "learner": {"lr": 1e-2, "zero_stage": 1},
            "logging": {"progress": "off"},
        },
        kind=SftConfig,
    )
    sft(config, resume=False)
    before = load_file(tiny() / "model.safetensors")
    after = final_weights(tmp_path / "run")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def summed_loss(model, batch):
    """Returns three numbers for the labeled tokens.

    The negative sum of their logprobs, how many there are, and how many of them are the model's
    most likely token.
    """
    total = torch.zeros(())
    num_tokens = 0
    num_correct = 0
    for row in batch:
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor(row["labels"])[1:]
        is_labelled = labels >= 0
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        label_logprobs = logprobs[is_labelled].gather(1, labels[is_labelled, None])
        total = total - label_logprobs.sum()
        num_tokens += int(is_labelled.sum())
        num_correct += int((logprobs.argmax(-1) == labels)[is_labelled].sum())
    return total, num_tokens, num_correct


def train_with_plain_torch(model, config):
    """Trains a model with AdamW for six updates.

    Returns:
        The mean loss and the mean accuracy over the solution tokens of each update.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    rows = load_training_rows(config)
    batch_size = config.sft.batch_size
    losses = []
    accuracies = []
    for update in range(6):
        batch = rows[batch_size * update : batch_size * (update + 1)]
        total, num_tokens, num_correct = summed_loss(model, batch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.learner, update, 6)
        optimizer.zero_grad()
        (total / num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(total.detach() / num_tokens))
        accuracies.append(num_correct / num_tokens)
    return losses, accuracies


def test_solutions_of_repeated_problems_are_stored_once_and_come_in_order(tiny):
    tokenizer = models.load_tokenizer(tiny())
    prompts = Prompts(configs.PromptSettings(template="plain", max_tokens=48), tokenizer)
    first, second = arithmetic.load("train", seed=0, digits=1)[:2]
    problems = [first, second, first]
    texts = SolutionTexts(problems, prompts, max_tokens=64, section="sft", weight=0.5)
    expected = []
    for problem in problems:
        prompt_ids, target_ids = prompts.token_ids(problem), prompts.solution_ids(problem)
        expected.append(
            Sample(
                token_ids=prompt_ids + target_ids,
                prompt_length=len(prompt_ids),
                advantages=(0.5,) * len(target_ids),
            )
        )
    assert texts[:2] + texts[2:] == expected
    assert texts[3:] == []


def test_ranks_that_share_sequences_make_the_updates_of_trl(tiny, tmp_path):
    for name, learner, num_ranks in (("trl", {}, 1), ("shared", {"sequence_parallel": 2}, 2)):
        config = sft_config(tmp_path / name, tiny(), learner=learner)
        run_grpo(write_config(tmp_path / "config.yaml", config), command="sft", ranks=num_ranks)
    rows, shared_rows = read_metrics(tmp_path / "trl"), read_metrics(tmp_path / "shared")
    assert len(rows) == len(shared_rows) == 6
    for row, shared_row in zip(rows, shared_rows, strict=True):
        for metric in ("loss", "policy/lr", "update/tokens"):
            assert shared_row[metric] == pytest.approx(row[metric], rel=1e-4), metric
    expected = final_weights(tmp_path / "trl")
    for name, weight in final_weights(tmp_path / "shared").items():
        assert torch.allclose(weight, expected[name], atol=1e-5), name


def test_ranks_that_cannot_share_sequences_are_rejected_before_the_model_is_loaded(tiny, tmp_path):
    config = sft_config(tmp_path / "run", tiny(), learner={"sequence_parallel": 2})
    with pytest.raises(UserError, match="sequence_parallel=2 does not divide the number of ranks"):
        sft(config, resume=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"sft\.stop_at does not support learner\."):
        sft_config(
            tmp_path, tiny(), learner={"sequence_parallel": 2}, sft={"updates": 1, "stop_at": 0.9}
        )


@pytest.mark.parametrize("attention", ["packed", "eager"])
def test_training_equals_plain_adamw_on_the_mean_loss_of_all_solution_tokens(
    tiny, tmp_path, attention
):
    """The loss is one mean over all solution tokens of two micro-batches, of 3 and 2 solutions."""
    sections = {"model": {"attention": attention}, "sft": {"batch_size": 5}}
    config = sft_config(tmp_path / "run", tiny(), **sections)
    run_grpo(write_config(tmp_path / "c.yaml", config), command="sft")
    metrics = read_metrics(tmp_path / "run")

    model = models.load_model(tiny(), "eager")
    losses, accuracies = train_with_plain_torch(model, config)
    assert [row["update/micro_batches"] for row in metrics] == [2] * 6
    assert [row["policy/token_accuracy"] for row in metrics] == pytest.approx(accuracies)
    assert [row["loss"] for row in metrics] == pytest.approx(losses, rel=1e-4)
    expected_lr = [learning_rate(config.learner, update, 6) for update in range(6)]
    assert [row["policy/lr"] for row in metrics] == expected_lr
    weights = final_weights(tmp_path / "run")
    for name, parameter in model.named_parameters():
        assert torch.allclose(weights[name], parameter, atol=2e-5), name


def test_extended_context_is_part_of_the_trained_model(tiny, tmp_path):
    rope = {"type": "yarn", "factor": 4.0, "original_tokens": 512}
    config = sft_config(tmp_path / "run", tiny(), model={"rope": rope})
    run_grpo(write_config(tmp_path / "c.yaml", config), command="sft")
    saved = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert saved["max_position_embeddings"] == 2048
    assert saved["rope_parameters"]["rope_type"] == "yarn"
    assert saved["rope_parameters"]["factor"] == 4.0
    assert saved["rope_parameters"]["original_max_position_embeddings"] == 512

    extended_dir = models.extend_context(
        tiny(), RopeSettings(factor=4.0, original_tokens=512), tmp_path / "x"
    )
    plain = models.load_model(tiny(), "eager")
    extended = models.load_model(extended_dir, "eager")
    ids = torch.arange(7, 47)[None]
    plain_logits = plain(input_ids=ids).logits
    extended_logits = extended(input_ids=ids).logits
    assert not torch.allclose(plain_logits, extended_logits, atol=1e-3)

    final = tmp_path / "run" / "final"
    extended_twice = sft_config(tmp_path / "again", final, model={"rope": rope})
    config_file = write_config(tmp_path / "d.yaml", extended_twice)
    assert "is extended already" in run_grpo(config_file, command="sft", code=2)


def test_training_stops_at_the_target_and_keeps_the_last_update(tiny, tmp_path):
    config = sft_config(tmp_path / "run", tiny(), sft={"updates": 60, "stop_at": 0.01})
    run_grpo(write_config(tmp_path / "c.yaml", config), command="sft")
    assert len(read_metrics(tmp_path / "run")) == 10
    assert (tmp_path / "run" / "final").is_dir()


def test_missing_or_too_long_solution_raises(tiny, tmp_path):
    data_file = tmp_path / "bare.jsonl"
    data_file.write_text('{"problem": "1+1", "answer": "2"}\n')
    data = {"name": "jsonl", "path": str(data_file), "options": {}}
    config = sft_config(tmp_path / "run", tiny(), data=data)
    with pytest.raises(UserError, match="has no worked solution"):
        load_training_rows(config)

    config = sft_config(tmp_path / "run", tiny(), sft={"max_tokens": 12})
    with pytest.raises(UserError, match=r"tokens with its solution, more than sft.max_tokens=12"):
        load_training_rows(config)


def test_a_context_that_is_too_short_names_the_key_of_sft(tiny, tmp_path):
    sections = {"sft": {"max_tokens": 3000}, "learner": {"micro_batch_tokens": 3000}}
    config = sft_config(tmp_path / "run", tiny(), **sections)
    with pytest.raises(UserError, match=r"sft\.max_tokens = 3000 tokens, but the model's context"):
        sft(config, resume=False)
    overrides = ["sft.num_train_epochs=2"]
    with pytest.raises(UserError, match=r"unknown key \(its name is sft\.updates\)"):
        configs.load(write_config(tmp_path / "c.yaml", config), overrides, SftConfig)


def test_training_row_has_labels_on_the_solution_and_none_on_the_prompt(tiny, tmp_path):
    """The ids are those of an engine's prompt and completion: prompt, tagged solution, EOS."""
    row = load_training_rows(sft_config(tmp_path / "run", tiny()))[0]
    ids = row["input_ids"]
    labels = row["labels"]
    solution_ids = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    tokenizer = models.load_tokenizer(tiny())
    solution = tokenizer.decode(solution_ids)
    assert solution.startswith("<think>")
    assert solution.endswith("</answer><eos>")
    assert tokenizer.decode(ids).endswith(solution)
    prompt_length = len(ids) - len(solution_ids)
    assert labels[:prompt_length] == [-100] * prompt_length


def model_states(checkpoint):
    """Returns the weights in a DeepSpeed checkpoint by name."""
    file = next(checkpoint.rglob("mp_rank_00_model_states.pt"))
    return torch.load(file, weights_only=False)["module"]


@pytest.mark.parametrize(
    ("stage", "dtype"), [(1, "bfloat16"), pytest.param(2, "float32", marks=pytest.mark.slow)]
)
def test_exploding_gradients_are_skipped_and_the_third_in_a_row_stops_the_run(
    tiny, tmp_path, stage, dtype
):
    learner = {"zero_stage": stage, "skip_grad_norm": 1e-6, "offload_optimizer": stage == 2}
    config = sft_config(
        tmp_path / "run", tiny(), learner=learner, model={"dtype": dtype}, checkpoint={"every": 1}
    )
    config_file = write_config(tmp_path / "config.yaml", config)
    errors = run_grpo(config_file, command="sft", code=1)
    assert "not finite or above learner.skip_grad_norm=1e-06, 3 times in a row" in errors
    assert "Traceback" not in errors
    metrics = read_metrics(tmp_path / "run")
    assert len(metrics) == 2
    for row in metrics:
        assert row["update/not_finite"] == 1
        assert row["policy/grad_norm"] > 1e-6

    first, second = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    first_weights = model_states(first)
    second_weights = model_states(second)
    for name in first_weights:
        assert torch.equal(first_weights[name], second_weights[name]), name

    run_grpo(config_file, "--resume", "learner.skip_grad_norm=1000", command="sft")
    skipped = [row["update/not_finite"] for row in read_metrics(tmp_path / "run")]
    assert skipped == [1, 1, 0, 0, 0, 0]


def test_a_run_with_zero_3_writes_its_final_model(tiny, tmp_path):
    """In the ZeRO-3 mode of transformers, the empty model that `final/` needs cannot be created."""
    config = sft_config(tmp_path / "run", tiny(), learner={"zero_stage": 3}, sft={"updates": 2})
    run_grpo(write_config(tmp_path / "config.yaml", config), command="sft")
    before = load_file(tiny() / "model.safetensors")
    after = final_weights(tmp_path / "run")
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert after[name].shape == weight.shape, name
        assert not torch.equal(after[name], weight), name


def test_an_exception_in_the_users_data_set_does_not_block_the_corrected_command(tiny, tmp_path):
    (tmp_path / "broken.py").write_text("def load(split, *, seed, path): return {}['x']")
    data = {"name": f"{tmp_path}/broken.py:load", "options": {}}
    config = sft_config(tmp_path / "run", tiny(), data=data)
    for _ in range(2):  # the second attempt is not "already holds a run"
        with pytest.raises(KeyError):
            sft(config, resume=False)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_the_chat_template_of_a_run_is_recorded_and_a_changed_one_is_refused(tiny, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[-1]['content'] }}\n")
    prompt = {"template": "chat", "chat_template": str(template)}
    config = sft_config(tmp_path / "run", tiny(), prompt=prompt, sft={"updates": 2})
    config_file = write_config(tmp_path / "sft.yaml", config)
    run_grpo(config_file, command="sft")
    assert (tmp_path / "run" / "chat_template.jinja").read_text() == template.read_text()
    saved = (tmp_path / "run" / "final" / "chat_template.jinja").read_text()
    assert saved == template.read_text()
    template.write_text("Q: {{ messages[-1]['content'] }}\n")
    error = run_grpo(config_file, "--resume", command="sft", code=2)
    assert "prompt.chat_template: the file has changed" in error
