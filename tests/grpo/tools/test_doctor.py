"""The doctor.

Each thing that will go wrong is told by its name, with the way out, before it costs anything.
"""

import re
import types

import pytest
import yaml
from tiny_models import tiny_config
from whole_runs import write_config

from grpo import cli
from grpo.config import Config
from grpo.learning import models
from grpo.learning.learner import Learner
from grpo.losses.grpo import loss
from grpo.metrics import roofline
from grpo.stages.registry import find_stage
from grpo.tools import checks
from grpo.types import Problem


def told(checks):
    return {check.name: check for check in checks}


def shape_of(tiny, dtype="float32"):
    return roofline.shape(tiny(), models.num_weights(tiny()), dtype)


def memory_checks(tiny, config):
    """Returns the findings about a train config whose reference has one weight."""
    needs = find_stage("train").needs(config)
    return checks.memory(config, needs.memory, shape_of(tiny), 1)


def test_memory_that_is_not_there_is_told_with_every_part(tiny, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, tiny(), engine={"kv_cache_gb": 0.05, "max_sequences": 64})
    found = told(memory_checks(tiny, config))
    assert found["memory"].level == "ok" and found["kv_cache"].level == "ok"
    monkeypatch.setattr(
        checks.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=2**30)
    )
    found = told(memory_checks(tiny, config))
    assert (
        found["memory"].level == "fail"
        and "activations" in found["memory"].text
        and "gradient_checkpointing" in found["memory"].remedy
    )
    long = tiny_config(
        tmp_path,
        tiny(),
        engine={"kv_cache_gb": 0.0001},
        sampling={"max_tokens": 1900},
        learner={"micro_batch_tokens": 2000},
    )
    found = told(memory_checks(tiny, long))
    assert found["kv_cache"].level == "fail" and "increase it to" in found["kv_cache"].remedy


def test_the_states_are_those_that_the_learner_really_holds(tiny, tmp_path):
    config = tiny_config(tmp_path, tiny(), algorithm={"kl_coef": 0.1})
    parts = roofline.memory(config, shape_of(tiny))
    learner = Learner(
        models.load_model(tiny(), "eager"), config, loss, models.load_model(tiny(), "eager")
    )
    own = sum(p.numel() * p.element_size() for p in learner._policy.model.parameters())
    reference = sum(p.numel() * p.element_size() for p in learner._reference.model.parameters())
    assert (
        parts["weights"] == own
        and parts["reference"] == reference
        and parts["optimizer"] == 3 * own == 3 * parts["gradients"]
    )
    lora = tiny_config(
        tmp_path, tiny(), model={"path": str(tiny()), "dtype": "float32", "lora": {"rank": 4}}
    )
    assert roofline.memory(lora, shape_of(tiny))["optimizer"] < 0.5 * parts["optimizer"]


def test_held_out_problems_that_are_in_the_training_data_are_counted():
    question = "A farmer has twelve cows and buys three more at the market on Monday"
    train = [Problem(id="a", question=f"Well. {question}. How many?", answer="15", source="s")]
    judged = [
        Problem(id="b", question=f"{question}; then?", answer="15", source="s"),
        Problem(id="c", question="2 + 2?", answer="4", source="s"),
    ]
    (check,) = checks.contamination(train, judged)
    assert check.level == "warn" and check.text.startswith("1 of 2") and "b" in check.text
    (check,) = checks.contamination(train, judged[1:])
    assert check.level == "ok"
    short = [
        Problem(id="d", question="2  + 2?", answer="4", source="other"),
        Problem(id="e", question="2 - 2?", answer="0", source="s"),
    ]
    (check,) = checks.contamination(short, judged[1:])
    assert check.text.startswith("1 of 1")  # a short question is compared as a whole ...
    (check,) = checks.contamination(short[1:], judged[1:])
    assert check.level == "ok"  # ... not by its words


def test_a_disk_that_is_too_small_and_other_versions_are_told(tiny, tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "new" / "run", tiny())
    needs = find_stage("train").needs(config)
    assert told(checks.disk(config, needs.disk, 10**6))["disk"].level == "ok"
    assert told(checks.disk(config, needs.disk, 10**14))["disk"].level == "fail"
    assert told(checks.versions())["versions"].level == "ok"
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda name: "0.0.1")
    check = told(checks.versions())["versions"]
    assert check.level == "warn" and "torch 0.0.1 (tested: " in check.text


def test_a_format_reward_that_the_prompt_does_not_ask_for_is_told(tiny, tmp_path):
    config = tiny_config(tmp_path, tiny())
    tokenizer = models.load_tokenizer(tiny())
    problem = Problem(id="a", question="1 + 1?", answer="2", source="s")
    prompts = checks.Prompts(config.prompt, tokenizer)
    assert (
        told(checks.prompt(config, prompts, tokenizer, problem, config.rewards))["tags"].level
        == "warn"
    )
    prefilled = tiny_config(
        tmp_path, tiny(), prompt={"template": "plain", "max_tokens": 48, "think_prefill": True}
    )
    prompts = checks.Prompts(prefilled.prompt, tokenizer)
    found = told(checks.prompt(prefilled, prompts, tokenizer, problem, prefilled.rewards))
    assert (
        "tags" not in found
        and "<think>" in found["prompt"].text
        and "padding" in found["prompt"].text
    )


@pytest.mark.engine
def test_it_samples_and_grades_with_the_real_engine_and_leaves_nothing_behind(
    tiny, tmp_path, capsys
):
    config = tiny_config(tmp_path / "run", tiny(), logging={"progress": "off"})
    assert cli.main(["doctor", write_config(tmp_path / "c.yaml", config), "--price", "2"]) == 0
    out = capsys.readouterr().out
    assert (
        "8 problems by number of correct completions out of 8: 0:8" in out
        and "easier problems or a cold start" in out
    )
    assert "sent as in the run" in out and " at 2 per hour" in out and "nothing failed" in out
    assert not (tmp_path / "run").exists()


def test_different_vocabularies_fail_and_so_does_the_command(tiny, tmp_path, capsys):
    other = tmp_path / "other"
    models.make_tiny("tiny-qwen2", other, 0, vocab_size=300, hidden_size=64, num_hidden_layers=1)
    tokenizer = models.load_tokenizer(other)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(other)
    teacher = {"path": str(tiny()), "dtype": "float32", "teacher": str(other)}
    config = tiny_config(
        tmp_path / "run", tiny(), model=teacher, algorithm={"preset": "on_policy_distill"}
    )
    assert isinstance(config, Config)
    assert cli.main(["doctor", write_config(tmp_path / "c.yaml", config), "--no-sample"]) == 2
    assert "fail  vocabulary" in capsys.readouterr().out


def doctored(tmp_path, capsys, tree, *options, code=0):
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"run_dir": str(tmp_path / "run"), "logging": {"progress": "off"}} | tree)
    )
    assert cli.main(["doctor", str(tmp_path / "c.yaml"), *options]) == code
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().out


def test_every_stage_has_its_doctor(tiny, tmp_path, capsys):
    model, data = {"path": str(tiny()), "dtype": "float32"}, {"name": "arithmetic"}
    prompt = {"template": "plain", "max_tokens": 48}
    learned = {
        "model": model,
        "data": data,
        "prompt": prompt,
        "sft": {"updates": 2, "batch_size": 2, "max_tokens": 8},
    }
    out = doctored(tmp_path, capsys, learned, code=2)
    assert (
        re.search("fail  solutions .* exceed max_tokens=8", out)
        and "engine" not in out
        and "ok    memory" in out
    )
    good = {"sft": {"updates": 2, "batch_size": 2, "max_tokens": 256}}
    assert (
        "nothing failed" in (out := doctored(tmp_path, capsys, learned | good))
        and "contamination" not in out
    )
    lines = "".join(f'{{"question": "{i} + 1?", "answer": "{i + 1}"}}\n' for i in range(4))
    (tmp_path / "mine.jsonl").write_text(lines)
    own = {"name": "jsonl", "path": str(tmp_path / "mine.jsonl")}
    assert "4 problems have no solution" in doctored(
        tmp_path, capsys, learned | {"data": own}, code=2
    )
    sampled = {
        "model": model,
        "data": own,
        "prompt": prompt,
        "sampling": {"max_tokens": 16},
        "engine": {"kv_cache_gb": 0.05},
    }
    collect = {
        "problems": 4,
        "samples": 2,
        "decontaminate": {"jsonl": {"path": own["path"], "options": {"test_path": own["path"]}}},
    }
    out = doctored(tmp_path, capsys, sampled | {"collect": collect}, "--no-sample")
    assert "4 of 4 held-out problems" in out and "learner" not in out
    taught = sampled | {"model": model | {"teacher": str(tiny("tiny-qwen2"))}, "data": data}
    soft = taught | {"way": "soft", "soft": {"updates": 1, "batch_size": 2, "max_tokens": 256}}
    out = doctored(tmp_path, capsys, soft)
    assert "ok    vocabulary" in out and "reference" in out and "ok    solutions" in out
    text = taught | {
        "way": "sequence",
        "collect": {"problems": 4},
        "sft": {"updates": 1, "batch_size": 2, "max_tokens": 256},
        "data": own,
    }
    out = doctored(tmp_path, capsys, text, "--no-sample")
    # its traces are still to come
    assert "collect:" in out and "sft:" in out and "nothing failed" in out
    assert "engine" not in doctored(tmp_path, capsys, sampled | {"quantize": {}}, "--no-sample")
    sets = {
        "sets": {"one": {"name": "arithmetic"}},
        "data": {"name": "arithmetic"},
        "rewards": {"accuracy": 1.0},
    }
    out = doctored(tmp_path, capsys, sampled | sets, "eval.problems=9", "--no-sample")
    assert (
        "at most 9 problems" in out
        and "learner" not in out
        and "contamination" not in out
        and "ok    kv_cache" in out
    )
