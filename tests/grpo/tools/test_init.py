"""`grpo init`: what it decides for models, data and machines, the files it writes, its errors."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import serve_hub
from model_shapes import LLAMA, QWEN
from whole_runs import process_environment

from grpo import cli
from grpo import config as configs
from grpo.config.reading import read_yaml
from grpo.experience.plugins import plugin_names
from grpo.learning import models
from grpo.metrics.memory import (
    GB,
    UNUSABLE_GPU_BYTES,
    cpu_engine_memory,
    gpu_engine_memory,
    learner_memory,
    shared_gpu_bytes,
)
from grpo.stages.registry import stage_for_config
from grpo.tools.init.cost import in_words
from grpo.tools.init.data import choose_reward, data_section
from grpo.tools.init.hardware import Hardware, choose_hardware
from grpo.tools.init.model import read_model
from grpo.tools.init.plan import Run, choose_plan, plans
from grpo.tools.init.settings import Setting, read_overrides
from grpo.tools.init.sizes import choose_limit, learning_rate
from grpo.tools.init.text import flow, render, wrap_command
from grpo.types import Problem, UserError

SHAPES = {**QWEN, **{f"Llama {size}": shape for size, shape in LLAMA.items()}}
# Query heads and key-value heads
HEADS = {
    "0.5B": (14, 2),
    "1.5B": (12, 2),
    "3B": (16, 2),
    "7B": (28, 4),
    "14B": (40, 8),
    "32B": (40, 8),
    "Llama 1B": (32, 8),
    "Llama 8B": (32, 8),
}


def gpus(count, memory_gb):
    return Hardware(num_gpus=count, memory_gb=memory_gb, is_described=True)


def cpu(memory_gb):
    return Hardware(num_gpus=0, memory_gb=memory_gb, num_cores=8)


def make_run(model, hardware, stage="train", overrides=()):
    """Returns a run with prompts of 512 tokens, and completions of 1,024 or solutions of 2,048."""
    settings = [
        Setting("run_dir", "runs/x"),
        Setting("model.path", "x"),
        Setting("data.name", "gsm8k"),
        Setting("prompt.max_tokens", 512),
    ]
    if stage == "train":
        num_problems = max(64, 16 * hardware.num_gpus) if hardware.num_gpus else 16
        settings += [
            Setting("sampling.max_tokens", 1024),
            Setting("train.rollouts", 200),
            Setting("train.problems", num_problems),
            Setting("train.group_size", 8),
        ]
    else:
        settings += [Setting("sft.updates", 100), Setting("sft.max_tokens", 2048)]
    return Run(
        stage=stage,
        settings=tuple(settings),
        overrides=read_overrides(stage, overrides),
        shape=SHAPES[model],
        num_heads=HEADS[model],
    )


# The plan for each machine: its name and the keys that save memory.
FULL = ("full training", {"learner.micro_batch_tokens": 16384, "algorithm.kl_coef": 0.001})
PLANS = [
    ("0.5B", gpus(1, 24), "gradient checkpointing", {"learner.micro_batch_tokens": 16384}),
    ("0.5B", gpus(1, 48), *FULL),
    ("0.5B", gpus(1, 80), *FULL),
    ("0.5B", gpus(8, 24), "smaller micro-batches", {"learner.zero_stage": 2}),
    ("0.5B", gpus(8, 80), "full training", {"learner.zero_stage": 2}),
    ("0.5B", cpu(24), "gradient checkpointing", {"learner.micro_batch_tokens": 4096}),
    ("0.5B", cpu(64), "full training", {"learner.micro_batch_tokens": 4096}),
    ("1.5B", gpus(1, 24), "optimizer in main memory", {"learner.offload_optimizer": True}),
    ("1.5B", gpus(1, 48), "gradient checkpointing", {"model.gradient_checkpointing": True}),
    ("1.5B", gpus(1, 80), *FULL),
    ("1.5B", gpus(8, 24), "gradient checkpointing", {"learner.zero_stage": 2}),
    ("1.5B", gpus(8, 80), "full training", {"learner.zero_stage": 2}),
    ("1.5B", cpu(24), "LoRA", {"model.lora": {"rank": 16}, "learner.lr": 1e-5}),
    ("1.5B", cpu(64), "full training", {}),
    ("3B", gpus(1, 24), "LoRA", {"algorithm.kl_coef": 0.001}),
    ("3B", gpus(1, 48), "optimizer in main memory", {"algorithm.kl_coef": 0.001}),
    ("3B", gpus(1, 80), "gradient checkpointing", {}),
    ("3B", gpus(2, 48), "ZeRO stage 3", {"learner.zero_stage": 3}),
    ("7B", gpus(1, 48), "LoRA", {"learner.lr": 1e-5, "model.gradient_checkpointing": True}),
    ("7B", gpus(1, 80), "no reference model", {"algorithm.kl_coef": 0.0}),
    (
        "7B",
        gpus(8, 24),
        "servers on GPUs of their own",
        {"engine.servers": {"count": 2, "tensor_parallel": 2}},
    ),
    ("7B", gpus(8, 48), "optimizer in main memory", {"learner.zero_stage": 3}),
    ("7B", gpus(8, 80), "gradient checkpointing", {"learner.zero_stage": 2}),
    ("Llama 8B", gpus(1, 80), "no reference model", {"learner.offload_optimizer": True}),
    ("Llama 8B", gpus(8, 80), "gradient checkpointing", {}),
]


@pytest.mark.parametrize(("model", "hardware", "name", "keys"), PLANS)
def test_the_simplest_plan_that_fits_is_chosen(model, hardware, name, keys):
    plan = choose_plan(make_run(model, hardware), hardware).plan
    assert plan.name == name
    values = {setting.key: setting.value for setting in plan.settings}
    assert {key: values.get(key) for key in keys} == keys


@pytest.mark.parametrize("stage", ["train", "sft"])
@pytest.mark.parametrize("model", SHAPES)
def test_every_plan_that_is_chosen_fits_by_the_estimates_of_the_doctor(model, stage):
    num_fitting = 0
    machines = [gpus(count, gb) for count in (1, 2, 8) for gb in (24, 48, 80)]
    for hardware in (*machines, cpu(24), cpu(256)):
        run = make_run(model, hardware, stage)
        try:
            fit = choose_plan(run, hardware)
        except UserError as error:
            assert "does not fit on" in str(error)
            continue
        num_fitting += 1
        assert_fits(run.config(fit.plan.settings), run.shape, hardware)
    assert num_fitting >= 1


def assert_fits(config, shape, hardware):
    num_ranks = max(1, hardware.num_gpus)
    servers = config.engine.servers if hasattr(config, "engine") else None
    if servers:
        num_ranks -= servers.count * servers.tensor_parallel
    learner = learner_memory(config, shape, num_ranks)
    memory_bytes = hardware.memory_gb * GB
    if not hasattr(config, "engine"):
        engine_bytes = 0
    elif hardware.num_gpus == 0:
        engine = cpu_engine_memory(config.engine, shape.weight_bytes)
        engine_bytes = engine.total_bytes
    else:
        engine = gpu_engine_memory(config.engine, shape.weight_bytes, memory_bytes)
        engine_bytes = engine.total_bytes
        sequence_bytes = shape.kv_bytes_per_token * config.max_sequence_tokens
        assert engine.kv_cache_bytes >= config.engine.max_sequences * sequence_bytes
        assert config.engine.max_sequences >= 8
    if servers:
        needed_bytes = max(learner.total_bytes, engine_bytes)
    else:
        needed_bytes = shared_gpu_bytes(learner, engine_bytes, sleep=hardware.num_gpus > 0)
    usable_bytes = 0.95 * memory_bytes
    if hardware.num_gpus:
        usable_bytes = memory_bytes - UNUSABLE_GPU_BYTES
    assert needed_bytes <= usable_bytes


def test_a_model_that_fits_nowhere_is_an_error_that_names_the_shortage_and_a_machine():
    hardware = gpus(1, 24)
    with pytest.raises(UserError) as raised:
        choose_plan(make_run("7B", hardware), hardware)
    message = str(raised.value)
    assert "does not fit on one GPU with 24 GB: LoRA needs 3" in message
    assert re.search(r"1\d\.\d GB more than the 19\.5 GB that can be used", message)
    assert "It fits on one GPU with 40 GB or on 8 GPUs with 24 GB each" in message
    choose_plan(make_run("7B", gpus(1, 40)), gpus(1, 40))
    choose_plan(make_run("7B", gpus(8, 24)), gpus(8, 24))
    with pytest.raises(UserError):
        choose_plan(make_run("7B", gpus(4, 24)), gpus(4, 24))


def test_optimizer_states_are_not_put_into_a_main_memory_that_is_too_small():
    small = Hardware(num_gpus=1, memory_gb=24, main_memory_gb=16)
    large = Hardware(num_gpus=1, memory_gb=24, main_memory_gb=64)
    assert choose_plan(make_run("1.5B", small), small).plan.name == "LoRA"
    assert choose_plan(make_run("1.5B", large), large).plan.name == "optimizer in main memory"


def test_long_sequences_are_shared_by_gpus():
    hardware = gpus(8, 48)
    run = make_run("7B", hardware, "sft", ["sft.max_tokens=131072"])
    plan = choose_plan(run, hardware).plan
    assert plan.name == "shared sequences"
    config = run.config(plan.settings)
    assert config.learner.micro_batch_tokens == 131072
    assert config.learner.sequence_parallel in (2, 4)  # it divides 28 heads and 4 key-value heads


def test_the_plan_respects_the_command_line():
    hardware = gpus(8, 80)
    run = make_run("7B", hardware, overrides=["engine.servers={count: 4}", "learner.zero_stage=3"])
    fit = choose_plan(run, hardware)
    assert fit.num_ranks == 4
    config = run.config(fit.plan.settings)
    assert config.learner.zero_stage == 3
    assert config.engine.memory_fraction <= 0.85

    # ZeRO-3 splits the float32 head of this preset: plans with it are skipped.
    run = make_run("3B", gpus(2, 48), overrides=["algorithm.preset=cispo"])
    config = run.config(choose_plan(run, gpus(2, 48)).plan.settings)
    assert config.learner.zero_stage < 3

    with pytest.raises(UserError, match="leave no GPU for the learner"):
        choose_plan(make_run("7B", hardware, overrides=["engine.servers={count: 8}"]), hardware)


def test_later_plans_of_a_machine_have_distinct_names():
    for hardware in (gpus(1, 80), gpus(8, 80), cpu(64)):
        names = [plan.name for plan in plans(make_run("7B", hardware), hardware)]
        without_variants = [n for n in names if n not in ("shared sequences",) and "serv" not in n]
        assert len(set(without_variants)) == len(without_variants)
        assert names[0] == "full training"
        assert "LoRA" in names[-1]


def test_learning_rates_are_those_of_the_shipped_configs():
    shipped = Path(__file__).parents[3] / "configs"
    for name, shape in (("gsm8k_qwen2.5_1.5b", QWEN["1.5B"]), ("gsm8k_llama3.2_1b", LLAMA["1B"])):
        assert learning_rate(shape, "train") == configs.load(shipped / f"{name}.yaml").learner.lr


def test_a_limit_has_room_for_all_texts_but_outliers():
    assert choose_limit([100] * 50 + [150], all_measured=True) == (160, 0)
    assert choose_limit([100] * 50 + [150], all_measured=False) == (192, 0)
    lengths = [100] * 500 + [30_000]
    assert choose_limit(lengths, all_measured=True) == (224, 1)


DOCS = Path(__file__).parents[3] / "docs" / "configs.md"


def test_the_documented_plans_are_those_that_are_chosen():
    rows = re.findall(r"^\| ([\d.]+B) \| (.*) \|$", DOCS.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == ["0.5B", "1.5B", "3B", "7B"]
    machines = [gpus(1, 24), gpus(1, 48), gpus(1, 80), gpus(8, 80)]
    for name, cells in rows:
        for hardware, cell in zip(machines, cells.split(" | "), strict=True):
            try:
                assert choose_plan(make_run(name, hardware), hardware).plan.name == cell
            except UserError:
                assert cell == "does not fit"


# Data


def problem(answer="5", **meta):
    return Problem(id="a", question="2+3?", answer=answer, source="s", meta=meta)


@pytest.mark.parametrize(
    ("problems", "reward"),
    [
        ([problem("72"), problem("3/4")], "accuracy"),
        ([problem("A"), problem("(C)")], "choice"),
        ([problem("A", choices=["red", "blue"])], "choice"),
        ([problem("A"), problem("12")], "accuracy"),
        ([problem("3*5+7", numbers=[3, 5, 7], target=22)], "countdown"),
        ([problem("def f(): pass", test_list=["assert f() is None"])], "code"),
        ([problem("", io=[{"input": "1", "output": "1"}])], "code"),
    ],
)
def test_the_answers_decide_the_reward(problems, reward):
    assert choose_reward(problems, "x")[0] == reward


def test_answers_that_no_reward_can_read_are_an_error():
    unreadable = [problem("7" * 5000)] * 3
    with pytest.raises(UserError, match=r"accuracy cannot read 3 of 4 gold answers.*preference"):
        choose_reward([*unreadable, problem("5")], "x")
    with pytest.raises(UserError, match=r"3 of 3 problems have no answer.*preference"):
        choose_reward([problem("")] * 3, "x")


def test_what_data_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = plugin_names("grpo.data")
    write_problems(Path("mine.jsonl"), 3)
    Path("traces").mkdir()
    write_problems(Path("traces/traces.jsonl"), 3)
    Path("gsm8k").mkdir()  # a folder does not hide the data set
    assert data_section("gsm8k", "train", names) == {"name": "gsm8k"}
    assert data_section("mine.jsonl", "train", names) == {"name": "jsonl", "path": "mine.jsonl"}
    assert data_section("traces", "sft", names) == {"name": "traces", "path": "traces"}
    assert data_section("m:load", "train", names) == {"name": "m:load"}
    with_hub = sorted({*names, "hub"})
    assert data_section("owner/set", "train", with_hub) == {"name": "hub", "path": "owner/set"}
    without_hub = [name for name in names if name != "hub"]
    with pytest.raises(UserError, match=r"did you mean gsm8k\?"):
        data_section("openai/gsm8k", "train", without_hub)
    for wrong, message in (
        ("gms8k", r"did you mean gsm8k\?"),
        ("other.jsonl", "no such file"),
        ("./x", "no such file"),
        ("jsonl", "name that instead"),
    ):
        with pytest.raises(UserError, match=message):
            data_section(wrong, "train", names)
    Path("notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"Supported: \.jsonl"):
        data_section("notes.txt", "train", names)


# Machines


def test_options_describe_another_machine(monkeypatch, tmp_path):
    assert choose_hardware(8, 48) == gpus(8, 48)
    assert choose_hardware(2, None) == gpus(2, 80)
    assert choose_hardware(None, 24) == gpus(1, 24)
    assert str(gpus(1, 80)) == "one GPU with 80 GB"
    for num_gpus, gpu_gb in ((0, None), (1, 0), (1, -5), (None, float("nan"))):
        with pytest.raises(UserError, match="--gpu"):
            choose_hardware(num_gpus, gpu_gb)


def test_without_options_the_machine_is_this_one():
    hardware = choose_hardware(None, None)
    assert not hardware.is_described
    if hardware.num_gpus == 0:
        assert hardware.num_cores == len(os.sched_getaffinity(0))
        assert 0 < hardware.memory_gb < 10_000


def test_the_memory_of_a_gpu_is_read_from_nvidia_smi(monkeypatch, tmp_path):
    from grpo.tools.init import hardware

    monkeypatch.setattr(hardware.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="set --gpu-gb"):
        choose_hardware(None, None)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    program.chmod(0o755)
    found = choose_hardware(None, None)
    assert (found.num_gpus, found.memory_gb) == (2, 40.0)
    assert choose_hardware(4, None).memory_gb == 40.0


# Text


def test_a_comment_is_behind_its_key_or_above_it():
    tree = {"model": {"path": "x" * 40, "dtype": "bfloat16"}, "eval": {"every": 5}}
    comments = {"model.path": "y " * 40, "model.dtype": "short"}
    text = render(["made by hand"], tree, comments, {"": ["logging: {}"]})
    assert text.splitlines()[:2] == ["# made by hand", "model:"]
    assert "\n  dtype: bfloat16 # short\neval: {every: 5}\n# logging: {}\n" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert yaml.safe_load(text) == tree


@pytest.mark.parametrize(
    "value",
    [
        1e-6,
        1.25e-5,
        0.000123,
        0.001,
        1.0,
        16,
        True,
        None,
        "a: b",
        "no",
        "it's",
        [0.9, 0.95],
        {"a": [1, "x,y"]},
        {"my_rewards:brevity": 0.2, "f.py:g": {"weight": 1.0}},
    ],
)
def test_a_value_is_read_back_as_it_was_written(value, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"key: {flow(value)}\n")
    assert read_yaml(str(path)) == {"key": value}


def test_a_line_break_in_the_header_is_commented_out():
    assert render(["grpo init 'a\nb: c'"], {"seed": 0}, {}, {}) == (
        "# grpo init 'a\n# b: c'\nseed: 0\n"
    )


def test_a_long_command_can_be_copied():
    words = ["grpo", "init", *(f"train.key{index}=1" for index in range(20))]
    lines = wrap_command(words, 60)
    assert all(len(line) <= 60 for line in lines)
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert "".join(line.removesuffix("\\") for line in lines).split() == words


def test_durations_have_two_digits():
    assert [in_words(s) for s in (0.52, 7.31, 63.4, 600, 30_000)] == [
        "0.5 s",
        "7.3 s",
        "63 s",
        "10 minutes",
        "8.3 hours",
    ]


# Whole commands


def write_problems(path, count, **fields):
    """Writes problems with worked solutions, or with other `fields`, and returns the path."""
    rows = []
    for number in range(count):
        row = {"problem": f"What is {number} + 7?", "answer": str(number + 7)}
        row["solution"] = f"{number} + 7 = {number + 7}"
        rows.append({**row, **fields})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """Returns `make(chat_template, eos)`: config and tokenizer of a model with 0.9B weights."""

    def make(chat_template, **tokens):
        folder = tmp_path_factory.mktemp("large")
        models.make_tiny("tiny-qwen2", folder, 0, num_hidden_layers=1, hidden_size=64)
        (folder / "model.safetensors").unlink()
        config = json.loads((folder / "config.json").read_text())
        config |= {"hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 5504}
        config |= {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128}
        config |= {"max_position_embeddings": 32768, "layer_types": ["full_attention"] * 24}
        (folder / "config.json").write_text(json.dumps(config))
        tokenizer = models.load_tokenizer(folder)
        tokenizer.chat_template = chat_template
        if tokens:
            tokenizer.add_special_tokens({"extra_special_tokens": list(tokens.values())})
        tokenizer.save_pretrained(folder)
        return folder

    return make


def run_init(capsys, *words, code=0):
    """Runs `grpo init` and returns its output, or its error."""
    assert cli.main(["init", *map(str, words)]) == code
    output = capsys.readouterr()
    return output.err if code else output.out


def load(path):
    tree = read_yaml(str(path))
    return configs.load(str(path), kind=stage_for_config(tree).config_class)


def assert_well_formed(path):
    """Checks length, width and header of a file, and that its suggestions are valid."""
    lines = path.read_text().splitlines()
    assert 20 <= len(lines) <= 55  # a long path wraps the commands in the header
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("# grpo init ")
    assert any(line.startswith("#   grpo doctor ") for line in lines[:8])
    config = load(path)
    suggestion = re.compile(r"^( *)# (\w+: .*)$")
    uncommented = [suggestion.sub(r"\1\2", line) for line in lines]
    assert sum(map(str.__ne__, lines, uncommented)) >= 2
    path.with_suffix(".all.yaml").write_text("\n".join(uncommented))
    changed = load(path.with_suffix(".all.yaml"))
    assert changed.logging.trackers == ["tensorboard"]
    assert changed != config
    return config


@pytest.mark.parametrize("stage", ["train", "sft"])
def test_a_config_for_this_machine_passes_the_doctor(stage, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_problems(Path("mine.jsonl"), 120)
    path = Path("mine.yaml")
    output = run_init(capsys, path, "--model", tiny(), "--data", data, "--stage", stage)
    assert f"grpo {stage} {path}" in output
    config = assert_well_formed(path)
    assert config.data.name == "jsonl"
    assert config.run_dir == "runs/mine"
    if choose_hardware(None, None).num_gpus == 0:
        assert re.search(r"# (about|up to) .* each on \d+ cores", path.read_text())
    assert cli.main(["doctor", str(path), "--no-sample"]) == 0
    output = capsys.readouterr().out
    assert "fail " not in output
    assert "ok    memory" in output


def test_the_documented_config_has_the_form_of_a_generated_one(tiny, tmp_path, capsys):
    (documented,) = re.findall(r"^```yaml\n(# grpo init.*?)^```", DOCS.read_text(), re.S | re.M)
    sample = tmp_path / "sample.yaml"
    sample.write_text(documented)
    load(sample)
    generated = tmp_path / "g.yaml"
    data = write_problems(tmp_path / "mine.jsonl", 120)
    run_init(capsys, generated, "--model", tiny(), "--data", data)
    forms = [re.sub(r"[\d.,]+|#.*", "", line) for line in generated.read_text().splitlines()]
    for line in documented.splitlines():
        key = re.match(r" *\w+:", line)
        if key:
            assert any(form.startswith(key.group()) for form in forms), line
    generated_lines = generated.read_text().splitlines()
    for line in documented.splitlines():
        if re.match(r" +# (So small|no_signal)", line) or "the question alone" in line:
            assert line in generated_lines


def test_a_small_model_gets_a_cold_start(tiny, tmp_path, capsys):
    data = write_problems(tmp_path / "mine.jsonl", 120)
    path = tmp_path / "rl.yaml"
    output = run_init(capsys, path, "--model", tiny(), "--data", data)
    (command,) = re.findall(r"^  (grpo init .*)$", output, re.MULTILINE)
    cold_start = tmp_path / "rl_sft.yaml"
    assert f"model.warm_start={cold_start}" in output
    assert f"  # warm_start: {cold_start}\n" in path.read_text()
    assert load(path).prompt.template == "plain"
    run_init(capsys, *command.split()[2:])
    assert load(cold_start).prompt == load(path).prompt
    assert cli.main(["train", str(path), f"model.warm_start={cold_start}", "--dry-run"]) == 0


def test_a_chat_model_is_asked_for_the_tags(large, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_problems(Path("mine.jsonl"), 300)
    path = Path("chat.yaml")
    words = ["--model", large(CHAT_TEMPLATE), "--data", data, "--gpus", "8", "--gpu-gb", "80"]
    output = run_init(capsys, path, *words)
    assert f"grpo doctor {path} --gpus --gpu-gb 80" in output
    assert f"GPUS=8 ./launch/torchrun.sh train {path}" in output
    config = assert_well_formed(path)
    assert (config.prompt.template, config.prompt.system) == ("chat", "r1")
    assert config.rewards.keys() == {"accuracy", "format"}
    assert config.train.problems == 128
    assert config.learner.lr == 1e-6
    assert config.sampling.max_tokens == 1024
    assert config.checkpoint.keep_best == "eval/accuracy"
    assert cli.main(["doctor", str(path), "--gpus", "--gpu-gb", "80"]) == 0
    assert "warm_start" not in path.read_text()


def test_a_base_model_gets_the_prompt_of_r1_zero(large, tmp_path, capsys):
    """Also if its tokenizer has a chat template, as those of Qwen2.5's base models."""
    data = write_problems(tmp_path / "mine.jsonl", 300)
    other_end = CHAT_TEMPLATE.replace("<eos>", "<end>")
    for name, model in (("a", large(None)), ("b", large(other_end, end="<end>"))):
        path = tmp_path / f"{name}.yaml"
        output = run_init(capsys, path, "--model", model, "--data", data, "--gpus", "1")
        assert "a base model" in output
        assert load(path).prompt.template == "r1_zero"


def test_a_template_that_takes_no_system_prompt_or_opens_the_thoughts(large, tmp_path, capsys):
    data = write_problems(tmp_path / "mine.jsonl", 300)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    thinking = CHAT_TEMPLATE.replace("<assistant>", "<assistant><think>")
    for name, template in (("a", refusing + CHAT_TEMPLATE), ("b", thinking)):
        path = tmp_path / f"{name}.yaml"
        run_init(capsys, path, "--model", large(template), "--data", data, "--gpus", "1")
        config = load(path)
        assert (config.prompt.template, config.prompt.system) == ("chat", None)
        assert config.rewards.keys() == {"accuracy"}


def test_a_run_is_continued_with_its_own_prompt(tiny, tmp_path, capsys):
    run = tmp_path / "cold"
    shutil.copytree(tiny(), run / "final")
    (run / "manifest.json").write_text(json.dumps({"status": "done"}))
    prompt = {"template": "plain", "think_prefill": True, "max_tokens": 99}
    (run / "config.yaml").write_text(yaml.safe_dump({"run_dir": str(run), "prompt": prompt}))
    data = write_problems(tmp_path / "mine.jsonl", 120)
    path = tmp_path / "rl.yaml"
    output = run_init(capsys, path, "--model", run, "--data", data)
    config = load(path)
    assert config.model.path == str(run / "final")
    assert (config.prompt.template, config.prompt.think_prefill) == ("plain", True)
    assert config.prompt.max_tokens < 99
    assert "cold start" not in output


def test_overrides_land_in_the_file_and_are_respected(tiny, tmp_path, capsys):
    data = write_problems(tmp_path / "mine.jsonl", 120)
    path = tmp_path / "mine.yaml"
    overrides = [
        "train.rollouts=3",
        "prompt.template=r1_zero",
        "rewards={accuracy: 1.0, length: 0.5}",
        "engine.start_timeout_s=99",
        "logging.trackers=[wandb]",
        "eval.every=4",
    ]
    run_init(capsys, path, "--model", tiny(), "--data", data, *overrides)
    config = load(path)
    assert config.train.rollouts == 3
    assert config.prompt.template == "r1_zero"
    assert config.prompt.max_tokens == 384  # R1-Zero's text has about 360 tokens: bytes and tags
    assert config.rewards.keys() == {"accuracy", "length"}
    assert config.engine.start_timeout_s == 99
    assert config.checkpoint.every == 4
    text = path.read_text()
    assert "  rollouts: 3 # given on the command line\n" in text
    assert "# logging" not in text


def test_without_held_out_problems_nothing_is_evaluated(tiny, tmp_path, capsys):
    data = write_problems(tmp_path / "mine.jsonl", 1)
    path = tmp_path / "mine.yaml"
    run_init(capsys, path, "--model", tiny(), "--data", data)
    config = load(path)
    assert config.eval.every == 0
    assert config.checkpoint.keep_best is None
    assert config.train.problems == 1
    assert cli.main(["doctor", str(path), "--no-sample"]) == 0


def test_traces_are_recognised(tiny, tmp_path, capsys):
    """Supervised training on a file whose rows have no answers."""
    path = tmp_path / "t.yaml"
    rows = [
        {"problem": f"{n}+1?", "solution": f"<think>{n} and 1.</think> {n + 1}"} for n in range(60)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_init(capsys, path, "--model", tiny(), "--data", data, "--stage", "sft")
    assert load(path).data.name == "traces"
    assert cli.main(["doctor", str(path), "--no-sample"]) == 0
    output = capsys.readouterr().out
    assert "fail " not in output
    assert "warn  tags" not in output


ERRORS = [
    (["--data", "gms8k"], r"did you mean gsm8k\?"),
    (["--data", "{tmp}/none.jsonl"], "no such file"),
    (["--data", "{tmp}/no_answers.jsonl"], "no field 'answer'.*preference"),
    (["--data", "{tmp}/odd.jsonl"], "odd.jsonl: line 2"),
    (["--data", "{tmp}/no_solutions.jsonl", "--stage", "sft"], "39 of 39 problems have no worked"),
    (["--data", "{tmp}/mine.jsonl", "train.rollout=5"], r"did you mean rollouts\?"),
    (["--data", "{tmp}/mine.jsonl", "train.rollouts=many"], "train.rollouts: .*got 'many'"),
    (["--data", "{tmp}/mine.jsonl", "--gpus", "0"], "--gpus 0: expected"),
    (["--data", "{tmp}/mine.jsonl", "sampling.max_tokens=9000"], "exceeds the model's context"),
    (["--data", "{tmp}/mine.jsonl", "prompt.max_tokens=2047"], "leaves no room for completions"),
    (["--data", "{tmp}/mine.jsonl", "prompt.template=chat"], "no chat template"),
    (["--data", "{tmp}/mine.jsonl", "prompt={template: plain}"], "set single keys, such as prompt"),
    (["--data", "{tmp}/mine.jsonl", "data.mixture={math: {}}"], "knows the data of --data only"),
]


@pytest.mark.parametrize(("words", "message"), ERRORS)
def test_mistakes_are_errors_of_one_line(words, message, tiny, tmp_path, capsys):
    write_problems(tmp_path / "mine.jsonl", 40)
    write_problems(tmp_path / "no_solutions.jsonl", 40, solution=None)
    (tmp_path / "no_answers.jsonl").write_text('{"problem": "2+3?", "solution": "5"}\n')
    (tmp_path / "odd.jsonl").write_text('{"problem": "a", "answer": "1"}\n[1, 2]\n')
    words = [word.replace("{tmp}", str(tmp_path)) for word in words]
    error = run_init(capsys, tmp_path / "c.yaml", "--model", tiny(), *words, code=2)
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "c.yaml").exists()


def test_prompts_without_answers_can_be_graded_by_a_model(tiny, tmp_path, capsys):
    data = tmp_path / "mine.jsonl"
    data.write_text('{"problem": "Write a poem."}\n' * 3)
    path = tmp_path / "c.yaml"
    options = "{url: 'http://localhost:8000/v1', model: judge}"
    overrides = [
        "data.options={answers: false}",
        f"rewards={{preference: {{weight: 1.0, options: {options}}}}}",
    ]
    run_init(capsys, path, "--model", tiny(), "--data", data, *overrides)
    config = load(path)
    assert config.rewards.keys() == {"preference"}
    assert config.eval.every == 0


def test_an_existing_file_is_not_overwritten_and_wrong_targets_are_errors(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    for target, message in (
        (path, "exists already"),
        (tmp_path / "new" / "c.yaml", "there is no folder"),
        ("train.rollouts=5", "ends in .yaml"),
    ):
        assert message in run_init(capsys, target, "--model", "m", "--data", "gsm8k", code=2)
    assert path.read_text() == "mine"


def test_a_target_that_cannot_be_written_is_an_error(tiny, tmp_path, capsys, monkeypatch):
    def no_space(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grpo.tools.init.write_file", no_space)
    data = write_problems(tmp_path / "mine.jsonl", 40)
    path = tmp_path / "c.yaml"
    error = run_init(capsys, path, "--model", tiny(), "--data", data, code=2)
    assert f"{path}: cannot be written: [Errno 28] No space left" in error


def test_a_config_in_the_working_directory_is_not_taken_for_the_run_of_the_model(
    tiny, tmp_path, monkeypatch
):
    shutil.copytree(tiny(), tmp_path / "model")
    (tmp_path / "config.yaml").write_text("prompt: {template: r1_zero}\n")
    monkeypatch.chdir(tmp_path)
    assert read_model("model", read_overrides("train", [])).run_prompt == {}


def test_what_jsonl_cannot_read_is_left_to_hub(tiny, tmp_path, capsys):
    rows = []
    for number in range(40):
        message = {"role": "user", "content": f"{number} + 1?"}
        rows.append({"prompt": [message], "reward_model": {"ground_truth": str(number + 1)}})
    folder = tmp_path / "owner" / "set"
    folder.mkdir(parents=True)
    file = folder / "a: b.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for index, path in enumerate((file, folder)):
        config = tmp_path / f"{index}.yaml"
        run_init(capsys, config, "--model", tiny(), "--data", path)
        assert load(config).data.name == "hub"


def test_the_comment_says_why_nothing_is_evaluated(tiny, tmp_path, capsys):
    data = write_problems(tmp_path / "mine.csv.jsonl", 40)
    path = tmp_path / "c.yaml"
    words = ["--model", tiny(), "--data", data, "data.name=hub", "data.options.test_split=nope"]
    run_init(capsys, path, *words)
    text = " ".join(path.read_text().replace("#", "").split())
    assert "no held-out problems: data.split" in text
    assert "has no split 'nope'" in text


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", '{"num_attention_heads": 0, "hidden_size": 64}', "config.json"),
        ("generation_config.json", "[1]", "expected a JSON object"),
        ("generation_config.json", "{", "expected a JSON object"),
    ],
)
def test_broken_files_of_a_model_are_errors(file, text, message, tiny, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny(), model)
    (model / file).write_text(text)
    data = write_problems(tmp_path / "mine.jsonl", 40)
    error = run_init(capsys, tmp_path / "c.yaml", "--model", model, "--data", data, code=2)
    assert message in error
    assert error.count("\n") == 1


def test_a_cpu_without_avx512_trains_in_float32(tiny, tmp_path, capsys, monkeypatch):
    data = write_problems(tmp_path / "mine.jsonl", 40)
    for warning, dtype in (("slow", "float32"), (None, "bfloat16")):
        monkeypatch.setattr("grpo.tools.init.bfloat16_warning", lambda warning=warning: warning)
        path = tmp_path / f"{dtype}.yaml"
        run_init(capsys, path, "--model", tiny(), "--data", data)
        assert load(path).model.dtype == dtype


def test_several_gpus_need_the_launch_scripts(tiny, tmp_path, capsys, monkeypatch):
    data = write_problems(tmp_path / "mine.jsonl", 40)
    words = ["--model", tiny(), "--data", data, "--gpus", "2"]
    run = f"GPUS=2 ./launch/torchrun.sh train {tmp_path}/c.yaml"
    assert "--copy" not in run_init(capsys, tmp_path / "c.yaml", *words)
    (tmp_path / "c.yaml").unlink()
    monkeypatch.chdir(tmp_path)
    output = run_init(capsys, tmp_path / "c.yaml", *words)
    assert output.index("  grpo files --copy .\n") < output.index(f"  {run}")


def test_models_that_cannot_be_used_are_errors(tiny, tmp_path, capsys):
    data = write_problems(tmp_path / "mine.jsonl", 40)
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tiny() / "config.json", folder)
    vision = tmp_path / "vision"
    shutil.copytree(tiny(), vision)
    config = json.loads((vision / "config.json").read_text())
    (vision / "config.json").write_text(json.dumps({"model_type": "unheard_of", "text": config}))
    for model, message in (
        ("owner/unknown", "no cached copy. Check the name; or run grpo init where"),
        (tmp_path / "none", "no such directory"),
        (folder, "the tokenizer cannot be loaded"),
        (vision, "config.json"),
    ):
        error = run_init(capsys, tmp_path / "c.yaml", "--model", model, "--data", data, code=2)
        assert message in error
        assert error.count("\n") == 1


def test_a_model_of_the_hub_is_read_without_its_weights(tiny, tmp_path):
    """In a process of its own, because huggingface_hub reads its variables when imported."""
    data = write_problems(tmp_path / "mine.jsonl", 120)
    path = tmp_path / "c.yaml"
    command = [sys.executable, "-m", "grpo", "init", str(path), "--model", "owner/tiny"]
    variables = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    with serve_hub(tiny()) as address:
        process = subprocess.run(
            [*command, "--data", data],
            env=process_environment() | variables | {"HF_ENDPOINT": address},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert process.returncode == 0, process.stderr
    assert load(path).model.path == "owner/tiny"
    assert list((tmp_path / "cache").rglob("tokenizer.json"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.engine
def test_a_config_for_smollm2_passes_the_doctor_with_samples(tmp_path, capsys):
    data = write_problems(tmp_path / "mine.jsonl", 120)
    path = tmp_path / "mine.yaml"
    run_init(capsys, path, "--model", "HuggingFaceTB/SmolLM2-135M-Instruct", "--data", data)
    assert cli.main(["doctor", str(path)]) == 0
    output = capsys.readouterr().out
    assert "fail " not in output
    assert "sent as in the run" in output
