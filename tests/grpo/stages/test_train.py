"""Whole runs with the real vLLM and the real DeepSpeed.

They learn, they resume bit for bit, they end cleanly however they end.
"""

import json
import re
import subprocess

import psutil
import pytest
import torch
from tiny_models import tiny_config
from whole_runs import again, outcome, rows, run, start, uninterrupted, wait_for, write_config

from grpo import config as configs
from grpo.cli import main
from grpo.learning import models
from grpo.stages.train import warm_start_config
from grpo.types import UserError

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp("straight"), tiny())


def test_a_run_leaves_what_the_readme_says(straight):
    folder = straight[0] / "run"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (
        manifest["status"] == "finished"
        and manifest["seed"] == 0
        and "torch" in manifest["versions"]
    )
    assert [row["rollout"] for row in rows(folder)] == [0, 1, 2, 3, 4]
    assert all(row["group/no_signal"] < 1 for row in rows(folder)[1:])
    assert (
        rows(folder)[4]["update"] == 8
        and {"eval/accuracy", "probe/gap", "sync/seconds", "kl/ref", "policy/entropy"}
        <= rows(folder)[4].keys()
    )
    kept = [
        json.loads(line)
        for line in (folder / "samples" / "step-000003.jsonl").read_text().splitlines()
    ]
    assert (
        len(kept) == 16
        and {"problem", "completion", "reward", "parts", "advantage"} <= kept[0].keys()
    )
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "step-000003",
        "step-000004",
    ]
    assert configs.load(str(folder / "config.yaml")) == configs.load(straight[1])


def test_eval_evaluates_the_final_model_with_samples_and_greedily(straight, tmp_path):
    final = straight[0] / "run" / "final"
    overrides = [
        f"run_dir={tmp_path / 'eval'}",
        f"model.path={final}",
        "eval={every: 1, problems: 3, samples: 2, temperature: 1.0}",
    ]
    run(straight[1], *overrides, command="eval")
    (row,) = rows(tmp_path / "eval")
    kept = [
        json.loads(line)
        for line in (tmp_path / "eval" / "samples" / "eval-000000.jsonl").read_text().splitlines()
    ]
    assert len(kept) == 3 * 2 + 3
    for prefix, part in (("eval/", kept[:6]), ("eval/greedy/", kept[6:])):
        assert row[prefix + "digits:share"] == pytest.approx(
            sum(k["parts"]["digits:share"] for k in part) / len(part)
        )
    assert json.loads((tmp_path / "eval" / "manifest.json").read_text())["status"] == "finished"


def test_final_loads_in_transformers_and_in_vllm(straight, tmp_path):
    from grpo.engines import Request, SamplingOptions
    from grpo.engines.local.engine import VllmEngine
    from grpo.engines.vllm_options import ServedModel

    final = straight[0] / "run" / "final"
    model = models.load_model(final, "eager")
    tokenizer = models.load_tokenizer(final)
    settings = configs.Engine(kv_cache_gb=0.05)
    log = tmp_path / "log"
    served = ServedModel(model_dir=str(final), dtype="float32", max_model_len=64, load_weights=True)
    engine = VllmEngine(model=served, settings=settings, log_file=log)
    try:
        ids = tuple(tokenizer("12+34=\n")["input_ids"])
        (completion,) = engine.generate(
            [Request(prompt_ids=ids, seed=0)], SamplingOptions(max_tokens=4, temperature=0.0)
        )[0]
        assert completion.token_ids[0] == int(
            model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
        )
    finally:
        engine.close()


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(straight, tmp_path):
    """2 rollouts, kill -9 during the third, resume.

    The same metrics, completions and weights as 4 at once.
    """
    config = again(straight, tmp_path)
    process = start(config)
    wait_for(lambda: (tmp_path / "run" / "checkpoints" / "step-000002").exists(), process)
    child = psutil.Process(process.pid).children()[0]
    process.kill()
    process.communicate()
    child.wait(timeout=5)
    assert not (tmp_path / "run" / "final").exists()
    run(config, "--auto-resume")
    metrics, samples, weights = outcome(tmp_path / "run")
    expected_metrics, expected_samples, expected_weights = outcome(straight[0] / "run")
    assert metrics == expected_metrics
    assert samples == expected_samples
    assert weights == expected_weights


def test_a_benchmark_prints_each_phase_beside_its_bound_and_leaves_nothing(tiny, tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny()))
    process = start(config, "train.rollouts=1", command="bench", stdout=subprocess.PIPE)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert all(
        re.search(rf"^{phase} .*\d", out, re.MULTILINE)
        for phase in ("rollout", "update", "sync", "probe")
    ), out
    assert not (tmp_path / "run").exists()


def test_grpo_learns_what_is_rewarded(tiny, tmp_path):
    """A user's own reward, the share of digits, rises by GRPO alone from random weights."""
    sections = {
        "train": {"rollouts": 12, "problems": 8, "group_size": 8},
        "learner": {"lr": 5e-3},
        "rewards": {"digits:share": 1.0},
    }
    config = write_config(
        tmp_path / "config.yaml",
        tiny_config(tmp_path / "run", tiny(), **sections, checkpoint={"every": 0}),
    )
    run(config)
    rewards = [row["reward/mean"] for row in rows(tmp_path / "run") if "reward/mean" in row]
    assert rewards[-1] > 3 * rewards[0] + 0.1, rewards


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=nowhere/at/all"], "model.path=nowhere/at/all: no such directory"),
        (["rewards={acuracy: 1}"], "rewards.acuracy: unknown reward"),
        (["data.name=jsonl", "data.options={}", "data.path=broken.jsonl"], "broken.jsonl: line 2"),
        (["data.options={digitz: 2}"], "data.arithmetic.options: "),
        (
            [
                "prompt.max_tokens=1",
                "probe.tokens=4",
                "data.name=jsonl",
                "data.options={}",
                "data.path=good.jsonl",
            ],
            "prompts are longer than prompt.max_tokens=1",
        ),
        (["prompt.template=chat"], "this tokenizer has no chat template"),
        (
            ["prompt.max_tokens=4000", "learner.micro_batch_tokens=9000"],
            "but the model's context is 2048",
        ),
        (["engine.kv_cache_gb=100000"], "the engine needs about"),
        (["algorithm.loss=gpro"], "algorithm.loss.gpro: unknown loss. Available: cispo"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2_before_any_engine_starts(
    tiny, tmp_path, monkeypatch, capfd, overrides, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n{"problem": oops\n')
    (tmp_path / "good.jsonl").write_text(
        "".join(json.dumps({"problem": f"{i}+1", "answer": str(i + 1)}) + "\n" for i in range(40))
    )
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny()))
    assert main(["train", config, *overrides]) == 2
    errors = capfd.readouterr().err
    assert message in errors and errors.startswith("grpo: ") and errors.count("\n") == 1
    assert not (tmp_path / "run" / "engine.log").exists()
    # the mended config can start in the same place
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_warm_start_begins_from_the_model_that_the_run_is_given():
    config = configs.load("configs/tiny.yaml", ["model.path=runs/other/final", "seed=3"])
    start = warm_start_config(config)
    assert (start.model.path, start.seed) == ("runs/other/final", 3)


def test_a_run_is_no_model_and_the_error_names_the_model_in_it(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"directory of a run: use {tmp_path}/final"):
        models.resolve(str(tmp_path), None, tmp_path / "model", 0)


def test_rollouts_on_a_server_stay_within_their_staleness_and_prove_their_weights(tiny, tmp_path):
    sections = {
        "train": {"rollouts": 3, "problems": 4, "group_size": 4, "max_staleness": 1},
        "rewards": {"digits:share": 1.0},
        "algorithm": {"mismatch": "tis"},
        "engine": {"servers": {"count": 1}, "timeout_s": 100},
        "checkpoint": {"every": 0},
    }
    config = tiny_config(tmp_path / "run", tiny(), **sections)
    run(write_config(tmp_path / "config.yaml", config))
    first, *steps = rows(tmp_path / "run")
    assert len(steps) == 3 and all(row["staleness/max"] <= 1 for row in steps)
    assert all(row["probe/gap"] < 1e-4 for row in (first, *steps))
