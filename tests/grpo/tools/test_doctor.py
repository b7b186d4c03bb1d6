"""`grpo doctor`: the findings of each check, and the checks of each stage."""

import json
import re
import types

import pytest
from tiny_models import make_tiny_with, merging_tokenizer, tiny_config
from whole_runs import write_config, write_yaml

from grpo import cli
from grpo.config import TrainConfig
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.learning.learner import Learner
from grpo.learning.policy import Reference
from grpo.losses.grpo import loss
from grpo.metrics import roofline
from grpo.metrics.memory import learner_memory
from grpo.stages.registry import find_stage
from grpo.tools import checks
from grpo.types import Problem

ARITHMETIC = {"name": "arithmetic"}


def by_name(findings):
    return {finding.name: finding for finding in findings}


def shape_of(tiny):
    return roofline.model_shape(tiny(), models.num_weights(tiny()), "float32")


def memory_findings(tiny, config):
    """Returns the findings about a train config whose reference has one weight, by name."""
    needs = find_stage("train").needs(config)
    return by_name(checks.memory(config, needs.memory, shape_of(tiny), num_reference_weights=1))


def num_bytes(model):
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def test_insufficient_memory_and_kv_cache_fail_with_a_remedy(tiny, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, tiny(), engine={"kv_cache_gb": 0.05, "max_sequences": 64})
    findings = memory_findings(tiny, config)
    assert findings["memory"].level == "ok"
    assert findings["kv_cache"].level == "ok"

    monkeypatch.setattr(
        checks.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=2**30)
    )
    memory = memory_findings(tiny, config)["memory"]
    assert memory.level == "fail"
    assert "activations" in memory.text
    assert "gradient_checkpointing" in memory.remedy

    long_completions = tiny_config(
        tmp_path,
        tiny(),
        engine={"kv_cache_gb": 0.0001},
        sampling={"max_tokens": 1900},
        learner={"micro_batch_tokens": 2000},
    )
    kv_cache = memory_findings(tiny, long_completions)["kv_cache"]
    assert kv_cache.level == "fail"
    assert "increase the KV cache to" in kv_cache.remedy


def test_on_a_gpu_a_sleeping_engine_leaves_its_memory_to_the_update(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checks.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(checks.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(checks, "_available_bytes", lambda: 15 * 2**30)
    texts = {}
    for sleep in (True, False):
        engine = {"kv_cache_gb": None, "memory_fraction": 1 / 3, "sleep": sleep}
        learner = {"micro_batch_tokens": 500_000}
        config = tiny_config(tmp_path, tiny(), engine=engine, learner=learner)
        memory = memory_findings(tiny, config)["memory"]
        assert memory.level == "ok"
        texts[sleep] = memory.text
    learner = learner_memory(config, shape_of(tiny), reference_weights=1)
    assert learner.update_bytes > 2**30
    alternating_gb = 5 + learner.resident_bytes / 2**30
    assert f"at most {alternating_gb:.1f} GB at the same time; 15.0 GB on the GPU" in texts[True]
    simultaneous_gb = 5 + learner.total_bytes / 2**30
    assert f"at most {simultaneous_gb:.1f} GB at the same time" in texts[False]


def test_the_ranks_of_all_gpus_split_the_states_of_the_optimizer(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checks.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(checks, "_available_bytes", lambda: 80 * 2**30)
    monkeypatch.setattr(checks.torch.cuda, "device_count", lambda: 8)
    config = tiny_config(tmp_path, tiny(), learner={"zero_stage": 2})
    text = memory_findings(tiny, config)["memory"].text
    assert "80.0 GB on each of 8 GPUs" in text
    servers = tiny_config(tmp_path, tiny(), engine={"servers": {"count": 2, "tensor_parallel": 2}})
    assert "on each of 4 GPUs" in memory_findings(tiny, servers)["memory"].text


def test_estimated_state_sizes_equal_those_of_a_real_learner(tiny, tmp_path):
    config = tiny_config(tmp_path, tiny(), algorithm={"kl_coef": 0.1})
    estimate = learner_memory(config, shape_of(tiny)).parts
    policy = models.load_model(tiny(), "eager")
    reference = models.load_model(tiny(), "eager")
    learner = Learner(policy, config, loss, {"": Reference(reference)})
    policy_bytes = num_bytes(learner._policy.model)
    assert estimate["weights"] == policy_bytes
    assert estimate["reference"] == num_bytes(learner._references[""].model)
    assert estimate["optimizer"] == 3 * policy_bytes
    assert estimate["optimizer"] == 3 * estimate["gradients"]

    lora_config = tiny_config(
        tmp_path, tiny(), model={"path": str(tiny()), "dtype": "float32", "lora": {"rank": 4}}
    )
    lora_estimate = learner_memory(lora_config, shape_of(tiny)).parts
    assert lora_estimate["optimizer"] < 0.5 * estimate["optimizer"]


def test_held_out_problems_that_occur_in_the_training_data_are_counted():
    question = "A farmer has twelve cows and buys three more at the market on Monday"
    train = [Problem(id="a", question=f"Well. {question}. How many?", answer="15", source="s")]
    overlapping = Problem(id="b", question=f"{question}; then?", answer="15", source="s")
    short = Problem(id="c", question="2 + 2?", answer="4", source="s")
    (finding,) = checks.contamination(train, [overlapping, short])
    assert finding.level == "warn"
    assert finding.text.startswith("1 of 2")
    assert "b" in finding.text
    (finding,) = checks.contamination(train, [short])
    assert finding.level == "ok"

    # A question that is too short to share consecutive words must be equal, except for spaces.
    equal = Problem(id="d", question="2  + 2?", answer="4", source="other")
    similar = Problem(id="e", question="2 - 2?", answer="0", source="s")
    (finding,) = checks.contamination([equal, similar], [short])
    assert finding.text.startswith("1 of 1")
    (finding,) = checks.contamination([similar], [short])
    assert finding.level == "ok"


def test_insufficient_disk_space_fails_and_untested_versions_are_a_warning(
    tiny, tmp_path, monkeypatch
):
    config = tiny_config(tmp_path / "new" / "run", tiny())
    needs = find_stage("train").needs(config)
    assert by_name(checks.disk(config, needs.disk, 10**6))["disk"].level == "ok"
    assert by_name(checks.disk(config, needs.disk, 10**14))["disk"].level == "fail"
    assert by_name(checks.versions())["versions"].level == "ok"

    monkeypatch.setattr(checks.importlib.metadata, "version", lambda name: "0.0.1")
    versions = by_name(checks.versions())["versions"]
    assert versions.level == "warn"
    assert "torch 0.0.1 (tested: " in versions.text


def test_a_format_reward_without_a_prompt_that_mentions_the_tags_is_a_warning(tiny, tmp_path):
    tokenizer = models.load_tokenizer(tiny())
    problem = Problem(id="a", question="1 + 1?", answer="2", source="s")

    def prompt_findings(config):
        prompts = Prompts(config.prompt, tokenizer)
        return by_name(checks.prompt(config, prompts, tokenizer, problem, config.rewards))

    findings = prompt_findings(tiny_config(tmp_path, tiny()))
    assert findings["tags"].level == "warn"
    prefilled = {"template": "plain", "max_tokens": 48, "think_prefill": True}
    findings = prompt_findings(tiny_config(tmp_path, tiny(), prompt=prefilled))
    assert "tags" not in findings
    assert "<think>" in findings["prompt"].text
    assert "padding" in findings["prompt"].text


@pytest.mark.engine
def test_the_doctor_samples_with_the_real_engine_and_leaves_no_run_directory(
    tiny, tmp_path, capsys
):
    config = tiny_config(tmp_path / "run", tiny(), logging={"progress": "off"})
    assert cli.main(["doctor", write_config(tmp_path / "c.yaml", config), "--price", "2"]) == 0
    output = capsys.readouterr().out
    assert "8 problems by number of correct completions out of 8: 0:8" in output
    assert "easier problems or a cold start" in output
    assert "sent as in the run" in output
    assert " at 2 per hour" in output
    assert "nothing failed" in output
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_another_vocabulary_fails(tiny, tmp_path, capsys):
    teacher_dir = tmp_path / "other"
    models.make_tiny(
        "tiny-qwen2", teacher_dir, 0, vocab_size=300, hidden_size=64, num_hidden_layers=1
    )
    tokenizer = models.load_tokenizer(teacher_dir)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(teacher_dir)
    config = tiny_config(
        tmp_path / "run",
        tiny(),
        model={"path": str(tiny()), "dtype": "float32", "teacher": str(teacher_dir)},
        algorithm={"preset": "on_policy_distill"},
    )
    assert isinstance(config, TrainConfig)
    assert cli.main(["doctor", write_config(tmp_path / "c.yaml", config), "--no-sample"]) == 2
    assert "fail  vocabulary" in capsys.readouterr().out


@pytest.fixture
def unsolved_data(tmp_path):
    """Returns the `data` section of 4 problems that have answers but no solutions."""
    path = tmp_path / "mine.jsonl"
    with path.open("w") as file:
        for i in range(4):
            file.write(json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) + "\n")
    return {"name": "jsonl", "path": str(path)}


def sft_sections(tiny, data, max_tokens=256):
    return {
        "model": {"path": str(tiny()), "dtype": "float32"},
        "data": data,
        "prompt": {"template": "plain", "max_tokens": 48},
        "sft": {"updates": 2, "batch_size": 2, "max_tokens": max_tokens},
    }


def sampling_sections(tiny, data):
    return {
        "model": {"path": str(tiny()), "dtype": "float32"},
        "data": data,
        "prompt": {"template": "plain", "max_tokens": 48},
        "sampling": {"max_tokens": 16},
        "engine": {"kv_cache_gb": 0.05},
    }


def distill_sections(tiny, data):
    model = {"path": str(tiny()), "dtype": "float32", "teacher": str(tiny("tiny-qwen2"))}
    return {**sampling_sections(tiny, data), "model": model}


@pytest.fixture
def doctor(tmp_path, capsys):
    """Returns a function that runs the doctor on a config and returns its output.

    It asserts the exit code, and that the doctor leaves no run directory.
    """

    def run_doctor(sections, *options, code=0):
        run_dir = tmp_path / "run"
        tree = {"run_dir": str(run_dir), "logging": {"progress": "off"}, **sections}
        config = write_yaml(tmp_path / "c.yaml", tree)
        assert cli.main(["doctor", config, *options]) == code
        assert not run_dir.exists()
        return capsys.readouterr().out

    return run_doctor


def test_sft_solutions_that_are_too_long_fail(tiny, doctor):
    output = doctor(sft_sections(tiny, ARITHMETIC, max_tokens=8), code=2)
    assert re.search("fail  solutions .* exceed max_tokens=8", output)
    assert "engine" not in output
    assert "ok    memory" in output


def test_traces_without_the_tags_that_the_prompt_asks_for_are_a_finding(tiny, tmp_path, doctor):
    traces = [
        {"id": 1, "problem": "2+3?", "solution": "<think>2 and 3.</think> \\boxed{5}"},
        {"id": 2, "problem": "1+3?", "solution": "<think>1 and 3.</think> <answer>4</answer>"},
    ]
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(trace) + "\n" for trace in traces))
    sections = sft_sections(tiny, {"name": "traces", "path": str(path)}, max_tokens=1024)
    asking = {**sections, "prompt": {"template": "r1_zero", "max_tokens": 900}}
    output = doctor(asking, "--no-sample")
    assert re.search(
        "warn  tags .* asks for <answer>, but 1 of 2 solutions have no such tag", output
    )
    assert "asks for <answer>" not in doctor(sections, "--no-sample")


def test_a_valid_sft_config_passes_without_a_contamination_check(tiny, doctor):
    output = doctor(sft_sections(tiny, ARITHMETIC))
    assert "nothing failed" in output
    assert "contamination" not in output


def test_sft_problems_without_a_solution_fail(tiny, doctor, unsolved_data):
    output = doctor(sft_sections(tiny, unsolved_data, max_tokens=8), code=2)
    assert "4 problems have no solution" in output


def test_collect_reports_problems_that_occur_in_the_held_out_data(tiny, doctor, unsolved_data):
    path = unsolved_data["path"]
    collect = {
        "problems": 4,
        "samples": 2,
        "decontaminate": {"jsonl": {"path": path, "options": {"test_path": path}}},
    }
    sections = {**sampling_sections(tiny, unsolved_data), "collect": collect}
    output = doctor(sections, "--no-sample")
    assert "4 of 4 held-out problems" in output
    assert "learner" not in output


def test_soft_distillation_checks_vocabulary_reference_and_solutions(tiny, doctor):
    soft = {"updates": 1, "batch_size": 2, "max_tokens": 256}
    output = doctor({**distill_sections(tiny, ARITHMETIC), "way": "soft", "soft": soft})
    assert "ok    vocabulary" in output
    assert "reference" in output
    assert "ok    solutions" in output


def test_sequence_distillation_checks_both_stages_without_requiring_solutions(
    tiny, doctor, unsolved_data
):
    sections = {
        **distill_sections(tiny, unsolved_data),
        "way": "sequence",
        "collect": {"problems": 4},
        "sft": {"updates": 1, "batch_size": 2, "max_tokens": 256},
    }
    output = doctor(sections, "--no-sample")
    assert "collect:" in output
    assert "sft:" in output
    assert "nothing failed" in output  # the collect stage writes the solutions later


def test_quantize_checks_no_engine(tiny, doctor, unsolved_data):
    sections = {**sampling_sections(tiny, unsolved_data), "quantize": {}}
    assert "engine" not in doctor(sections, "--no-sample")


def test_eval_checks_the_kv_cache_but_no_learner_and_no_contamination(tiny, doctor):
    sections = {
        **sampling_sections(tiny, ARITHMETIC),
        "sets": {"one": ARITHMETIC},
        "rewards": {"accuracy": 1.0},
    }
    output = doctor(sections, "eval.problems=9", "--no-sample")
    assert "at most 9 problems" in output
    assert "learner" not in output
    assert "contamination" not in output
    assert "ok    kv_cache" in output


UNREADABLE = {"digits": "7" * 5000, "roots": r"\sqrt{" * 1500 + "2" + "}" * 1500}


def write_problems(path, answers):
    """Writes problems with these answers by id, whose choices are A and B, and returns the path."""
    with path.open("w") as file:
        for id, answer in answers.items():
            row = {"id": id, "question": f"{id}?", "answer": answer, "choices": ["red", "blue"]}
            file.write(json.dumps(row) + "\n")
    return str(path)


def test_gold_answers_that_no_reward_can_read_are_listed(tiny, doctor, tmp_path):
    readable = {f"row {i}": str(i) for i in range(60)}
    train_file = write_problems(tmp_path / "train.jsonl", {**readable, **UNREADABLE})
    test_file = write_problems(tmp_path / "test.jsonl", {"t1": "A", "t2": "5", "t3": "C"})
    data = {"name": "jsonl", "path": train_file, "options": {"test_path": test_file}}
    sections = {
        **sampling_sections(tiny, data),
        "train": {"rollouts": 1, "problems": 4, "group_size": 4},
        "eval": {"every": 1, "problems": 1},
        "rewards": {"accuracy": 1.0, "format": 0.1},
    }
    output = doctor(sections, "--no-sample")
    assert (
        "warn  gold_answers   jsonl, train: 2 of 62 gold answers cannot be read (3.23%)" in output
    )
    assert f"digits: '{'7' * 80}... (5,000 characters)' (accuracy: " in output
    assert "... (10,501 characters)' (accuracy: " in output
    assert "ok    gold_answers   jsonl, test: 3 gold answers can be read by accuracy" in output

    output = doctor(sections, "reward_pool.max_failed=0.03", "--no-sample", code=2)
    assert "fail  gold_answers   jsonl, train: 2 of 62" in output
    assert "the run would stop (reward_pool.max_failed)" in output

    output = doctor(
        {**sections, "rewards": {"choice": 1.0}}, "data.path=" + test_file, "--no-sample", code=2
    )
    assert (
        "fail  gold_answers   jsonl, train: 2 of 3 gold answers cannot be read (66.67%)" in output
    )
    assert "t2: '5' (choice: the gold answer is none of the choices)" in output


def test_only_the_first_gold_answers_of_a_generated_set_are_checked(tiny, doctor):
    sections = {
        **sampling_sections(tiny, ARITHMETIC),
        "sets": {"one": ARITHMETIC},
        "rewards": {"accuracy": 1.0},
    }
    expected = "arithmetic, test: the first 1,000 of 100,000 generated gold answers can be read"
    assert expected in doctor(sections, "--no-sample")
    assert "gold_answers" not in doctor({**sections, "rewards": {"format": 1.0}}, "--no-sample")


def test_soft_distillation_aligns_the_tokens_of_another_vocabulary(tiny, tmp_path, doctor):
    tokenizer = merging_tokenizer(["<think>12+3=15</think>"], vocabulary=280)
    make_tiny_with(tokenizer, tmp_path / "teacher", "tiny-qwen2")
    sections = distill_sections(tiny, ARITHMETIC)
    sections["model"] |= {"teacher": str(tmp_path / "teacher")}
    sections |= {"way": "soft", "soft": {"updates": 2, "batch_size": 2, "max_tokens": 96}}
    assert re.search("ok +vocabulary .*their tokens are aligned", doctor(sections))
    sections["soft"]["temperature"] = 2
    assert re.search("fail +vocabulary .*needs soft.temperature=1", doctor(sections, code=2))
