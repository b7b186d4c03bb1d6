"""`grpo sft`.

TRL's trainer under our run directory equals plain torch, resumes bit for bit, and says what is
wrong before it loads.
"""

import json

import pytest
import torch
from stage_configs import final_weights, sft_config
from whole_runs import rows, run, write_config

from grpo import config as configs
from grpo.config import SftConfig
from grpo.config.model import Rope
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.learning.deepspeed_setup import learning_rate
from grpo.stages.problems import load_problems, mixture
from grpo.stages.sft import training_rows
from grpo.types import UserError


def examples(config):
    tokenizer = models.load_tokenizer(config.model.path)
    prompts = Prompts(config.prompt, tokenizer)
    problems = mixture(config.data, load_problems(config.data, "train", 0), prompts, 0)
    return list(
        training_rows(
            problems.take(0, config.sft.updates * config.sft.batch_size),
            prompts,
            config.sft.max_tokens,
        )
    )


def test_adapters_are_trained_merged_and_saved(tiny, tmp_path):
    from safetensors.torch import load_file

    from grpo.stages.sft import sft

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
    before, after = (
        load_file(tiny() / "model.safetensors"),
        load_file(tmp_path / "run" / "final" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("attention", ["packed", "eager"])
def test_it_equals_plain_adamw_on_the_solutions_tokens_with_one_mean_an_update(
    tiny, tmp_path, attention
):
    """Two micro-batches an update.

    The loss is one mean over the update's solution tokens, EOS among them.
    """
    config = sft_config(tmp_path / "run", tiny(), model={"attention": attention})
    assert config.micro_batch == 2
    run(write_config(tmp_path / "c.yaml", config), command="sft")
    model = models.load_model(tiny(), "eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    data, losses = examples(config), []
    for update in range(6):
        total, tokens = torch.zeros(()), 0
        for row in data[4 * update : 4 * update + 4]:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            total = total - logprobs[labels >= 0].gather(1, labels[labels >= 0, None]).sum()
            tokens += int((labels >= 0).sum())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.learner, update, 6)
        optimizer.zero_grad()
        (total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(total.detach() / tokens))
    assert [row["loss"] for row in rows(tmp_path / "run")] == pytest.approx(losses, rel=1e-4)
    assert [row["policy/lr"] for row in rows(tmp_path / "run")] == [
        learning_rate(config.learner, update, 6) for update in range(6)
    ]
    trained = final_weights(tmp_path / "run")
    for name, parameter in model.named_parameters():
        assert torch.allclose(trained[name], parameter, atol=2e-5), name


def test_a_longer_context_is_in_the_model_that_is_trained_served_and_saved(tiny, tmp_path):
    rope = {"type": "yarn", "factor": 4.0, "original_tokens": 512}
    run(
        write_config(
            tmp_path / "c.yaml", sft_config(tmp_path / "run", tiny(), model={"rope": rope})
        ),
        command="sft",
    )
    saved = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert saved["max_position_embeddings"] == 2048
    assert (
        saved["rope_parameters"].items()
        >= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}.items()
    )
    extended = models.extended(tiny(), Rope(factor=4.0, original_tokens=512), tmp_path / "x")
    plain, longer = (models.load_model(folder, "eager") for folder in (tiny(), extended))
    ids = torch.arange(7, 47)[None]
    assert not torch.allclose(plain(input_ids=ids).logits, longer(input_ids=ids).logits, atol=1e-3)
    again = write_config(
        tmp_path / "d.yaml",
        sft_config(tmp_path / "again", tmp_path / "run" / "final", model={"rope": rope}),
    )
    assert "is extended already" in run(again, command="sft", code=2)


def test_it_stops_when_it_is_good_enough_and_the_last_update_is_kept(tiny, tmp_path):
    config = sft_config(tmp_path / "run", tiny(), sft={"updates": 60, "stop_at": 0.01})
    run(write_config(tmp_path / "c.yaml", config), command="sft")
    assert len(rows(tmp_path / "run")) == 10 and (tmp_path / "run" / "final").is_dir()


def test_a_solution_that_is_missing_or_too_long_is_named(tiny, tmp_path):
    data = tmp_path / "bare.jsonl"
    data.write_text('{"problem": "1+1", "answer": "2"}\n')
    with pytest.raises(UserError, match="has no worked solution"):
        examples(
            sft_config(
                tmp_path / "run", tiny(), data={"name": "jsonl", "path": str(data), "options": {}}
            )
        )
    with pytest.raises(UserError, match=r"tokens with its solution, more than sft.max_tokens=12"):
        examples(sft_config(tmp_path / "run", tiny(), sft={"max_tokens": 12}))


def test_what_is_learned_is_the_prompt_and_the_completion_of_the_training(tiny, tmp_path):
    """The ids are those that the engine will see.

    Prompt, solution with its tags, EOS; labels only on what a completion holds.
    """
    row = examples(sft_config(tmp_path / "run", tiny()))[0]
    tokenizer = models.load_tokenizer(tiny())
    learned = [
        token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100
    ]
    text = tokenizer.decode(learned)
    assert (
        text.startswith("<think>")
        and text.endswith("</answer><eos>")
        and tokenizer.decode(row["input_ids"]).endswith(text)
    )
    assert row["labels"][: len(row["labels"]) - len(learned)] == [-100] * (
        len(row["labels"]) - len(learned)
    )


@pytest.mark.parametrize(
    ("stage", "dtype"), [(1, "bfloat16"), pytest.param(2, "float32", marks=pytest.mark.slow)]
)
def test_updates_with_exploding_gradients_are_skipped_and_the_third_stops_the_run(
    tiny, tmp_path, stage, dtype
):
    learner = {"zero_stage": stage, "skip_grad_norm": 1e-6, "offload_optimizer": stage == 2}
    config = sft_config(
        tmp_path / "run", tiny(), learner=learner, model={"dtype": dtype}, checkpoint={"every": 1}
    )
    errors = run(write_config(tmp_path / "config.yaml", config), command="sft", code=1)
    assert (
        "not finite or above learner.skip_grad_norm=1e-06, 3 times in a row" in errors
        and "Traceback" not in errors
    )
    found = rows(tmp_path / "run")
    assert len(found) == 2 and all(
        row["update/not_finite"] == 1 and row["policy/grad_norm"] > 1e-6 for row in found
    )
    first, second = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    last = [
        torch.load(next(folder.rglob("mp_rank_00_model_states.pt")), weights_only=False)["module"]
        for folder in (first, second)
    ]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
    run(
        write_config(tmp_path / "config.yaml", config),
        "--resume",
        "learner.skip_grad_norm=1000",
        command="sft",
    )
    assert [row["update/not_finite"] for row in rows(tmp_path / "run")] == [1, 1, 0, 0, 0, 0]
