"""Complete runs of `grpo train`, `grpo eval` and `grpo bench` with real vLLM and real DeepSpeed."""

import contextlib
import json
import re
import subprocess
from dataclasses import asdict
from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny_models import make_tiny_with, merging_tokenizer, tiny_config
from whole_runs import (
    read_metrics,
    read_reproducible_results,
    run_grpo,
    start_grpo,
    train_uninterrupted,
    wait_for,
    write_config,
    write_config_for_other_folder,
)

from grpo import config as configs
from grpo.cli import main
from grpo.learning import learner as learner_module
from grpo.learning import lora, models, moe
from grpo.stages import train
from grpo.stages.start_model import Teachers
from grpo.types import Problem, UserError

pytestmark = pytest.mark.engine


def read_json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted_run(tiny, tmp_path_factory):
    """The folder and the config of an uninterrupted run, whose run directory is FOLDER/run."""
    return train_uninterrupted(tmp_path_factory.mktemp("uninterrupted"), tiny())


def test_run_directory_has_the_documented_contents(uninterrupted_run):
    folder, config_file = uninterrupted_run
    run_dir = folder / "run"
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["seed"] == 0
    assert "torch" in manifest["versions"]

    metrics = read_metrics(run_dir)
    assert [row["rollout"] for row in metrics] == [0, 1, 2, 3, 4]
    assert all(row["group/no_signal"] < 1 for row in metrics[1:])
    last_row = metrics[4]
    assert last_row["update"] == 8
    expected_keys = {"eval/accuracy", "probe/gap", "sync/seconds", "kl/ref", "policy/entropy"}
    assert expected_keys <= last_row.keys()

    samples = read_json_lines(run_dir / "samples" / "step-000003.jsonl")
    assert len(samples) == 16
    assert {"problem", "completion", "reward", "parts", "advantage"} <= samples[0].keys()

    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert checkpoints == ["step-000003", "step-000004"]
    assert configs.load(str(run_dir / "config.yaml")) == configs.load(config_file)


def mean_share_of_digits(samples):
    return sum(sample["parts"]["digits:share"] for sample in samples) / len(samples)


def test_eval_scores_the_final_model_with_sampling_and_with_greedy_decoding(
    uninterrupted_run, tmp_path
):
    folder, config_file = uninterrupted_run
    run_dir = tmp_path / "eval"
    overrides = [
        f"run_dir={run_dir}",
        f"model.path={folder / 'run' / 'final'}",
        "eval={every: 1, problems: 3, samples: 2, temperature: 1.0}",
    ]
    run_grpo(config_file, *overrides, command="eval")
    samples = read_json_lines(run_dir / "samples" / "eval-000000.jsonl")
    # 3 problems x 2 sampled completions, then one greedy completion per problem.
    assert len(samples) == 3 * 2 + 3
    (row,) = read_metrics(run_dir)
    assert row["eval/digits:share"] == pytest.approx(mean_share_of_digits(samples[:6]))
    assert row["eval/greedy/digits:share"] == pytest.approx(mean_share_of_digits(samples[6:]))
    assert json.loads((run_dir / "manifest.json").read_text())["status"] == "finished"


def test_transformers_and_vllm_load_the_final_model(uninterrupted_run, tmp_path):
    from grpo.engines import Request, SamplingOptions
    from grpo.engines.local.engine import VllmEngine
    from grpo.engines.vllm_options import ServedModel

    folder, _ = uninterrupted_run
    final = folder / "run" / "final"
    model = models.load_model(final, "eager")
    tokenizer = models.load_tokenizer(final)
    prompt_ids = tuple(tokenizer("12+34=\n")["input_ids"])
    logits = model(input_ids=torch.tensor([prompt_ids])).logits
    expected_token = int(logits[0, -1].argmax())

    served = ServedModel(model_dir=str(final), dtype="float32", max_model_len=64, load_weights=True)
    engine = VllmEngine(
        model=served, settings=configs.EngineSettings(kv_cache_gb=0.05), log_file=tmp_path / "log"
    )
    try:
        request = Request(prompt_ids=prompt_ids, seed=0)
        greedy = SamplingOptions(max_tokens=4, temperature=0.0)
        (completion,) = engine.generate([request], greedy)[0]
    finally:
        engine.close()
    assert completion.token_ids[0] == expected_token


def test_on_a_gpu_the_engine_measures_the_memory_before_the_learner_uses_it(
    tiny, tmp_path, monkeypatch
):
    """A learner that allocates or frees memory meanwhile would falsify the measurement."""
    events = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lora, "load_policy", lambda *_: None)

    class RecordingLearner:
        attention = "not used"

        def __init__(self, *_):
            events.append("learner")

        def close(self):
            events.append("closed")

    monkeypatch.setattr(learner_module, "Learner", RecordingLearner)
    engine = SimpleNamespace(wait_ready=lambda: events.append("engine is ready"))
    context = SimpleNamespace(
        run=SimpleNamespace(log_file=lambda name: tmp_path / name),
        display=SimpleNamespace(say=lambda text: None, phase=lambda step, name: None),
        stack=contextlib.ExitStack(),
    )
    learner_models = train.LearnerModels(SimpleNamespace(model_dir=tiny()), Teachers({}, {}))
    config = tiny_config(tmp_path, tiny())
    train._load_learner(config, context, learner_models, engine, loss=None)
    assert events[:2] == ["engine is ready", "learner"]


def test_deterministic_mode_rejects_mixtures_of_experts(tiny):
    moe.require_no_experts(tiny(), "engine.deterministic")
    with pytest.raises(UserError, match=r"engine\.deterministic does not support mixtures"):
        moe.require_no_experts(tiny("tiny-qwen3-moe"), "engine.deterministic")


def test_killed_and_resumed_run_equals_the_uninterrupted_run(uninterrupted_run, tmp_path):
    """After two of four rollouts the run is killed with SIGKILL. All results are bit-identical."""
    config = write_config_for_other_folder(uninterrupted_run, tmp_path)
    process = start_grpo(config)
    wait_for(lambda: (tmp_path / "run" / "checkpoints" / "step-000002").exists(), process)
    engine_process = psutil.Process(process.pid).children()[0]
    process.kill()
    process.communicate()
    engine_process.wait(timeout=5)
    assert not (tmp_path / "run" / "final").exists()

    run_grpo(config, "--auto-resume")
    metrics, samples, weights = read_reproducible_results(tmp_path / "run")
    expected_metrics, expected_samples, expected_weights = read_reproducible_results(
        uninterrupted_run[0] / "run"
    )
    assert metrics == expected_metrics
    assert samples == expected_samples
    assert weights == expected_weights


def test_benchmark_prints_every_phase_and_removes_its_run_directory(tiny, tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny()))
    process = start_grpo(config, "train.rollouts=1", command="bench", stdout=subprocess.PIPE)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    for phase in ("rollout", "update", "sync", "probe"):
        assert re.search(rf"^{phase} .*\d", output, re.MULTILINE), output
    assert not (tmp_path / "run").exists()


def test_training_increases_a_custom_reward(tiny, tmp_path):
    """Starting from random weights, GRPO increases the share of digits in the completions."""
    sections = {
        "train": {"rollouts": 12, "problems": 8, "group_size": 8},
        "learner": {"lr": 5e-3},
        "rewards": {"digits:share": 1.0},
        "checkpoint": {"every": 0},
    }
    config = tiny_config(tmp_path / "run", tiny(), **sections)
    run_grpo(write_config(tmp_path / "config.yaml", config))
    rewards = [row["reward/mean"] for row in read_metrics(tmp_path / "run") if "reward/mean" in row]
    assert rewards[-1] > 3 * rewards[0] + 0.1, rewards


@pytest.fixture
def data_files(tmp_path, monkeypatch):
    """Writes two data files to `tmp_path`, which becomes the working directory."""
    (tmp_path / "broken.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n{"problem": oops\n')
    problems = [{"problem": f"{i}+1", "answer": str(i + 1)} for i in range(40)]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("data_files")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=nowhere/at/all"], "model.path=nowhere/at/all: no such directory"),
        (["model.path=unfinished/final"], "no such directory: the run has not finished"),
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
        (["algorithm.loss=grp"], "algorithm.loss.grp: unknown loss (did you mean grpo?)"),
    ],
)
def test_user_error_is_one_line_with_exit_code_2_before_an_engine_starts(
    tiny, tmp_path, capfd, overrides, message
):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny()))

    assert main(["train", config, *overrides]) == 2
    errors = capfd.readouterr().err
    assert message in errors
    assert errors.startswith("grpo: ")
    assert errors.count("\n") == 1
    assert not (tmp_path / "run" / "engine.log").exists()
    # Without a manifest, the corrected config can start in the same run directory.
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"preset": "on_policy_distill"}, "which needs an exact divergence"),
        (
            {"preset": "on_policy_distill_exact", "teacher_top_k": 8},
            "different vocabularies, which needs algorithm.teacher_top_k=\n",
        ),
        ({"kl_coef": 0.1}, "which needs an exact divergence"),
    ],
)
def test_settings_that_need_the_teacher_s_vocabulary_raise(tiny, tmp_path, algorithm, message):
    tokenizer = merging_tokenizer(["12+34=46"], vocabulary=270)
    make_tiny_with(tokenizer, tmp_path / "teacher")
    config = tiny_config(
        tmp_path / "run",
        tiny(),
        model={"teacher": str(tmp_path / "teacher")},
        algorithm={"kl_coef": 0.0} | algorithm,
    )
    output = run_grpo(write_config(tmp_path / "c.yaml", config), code=2)
    assert message in output


def test_warm_start_uses_the_model_and_the_seed_of_the_run():
    config = configs.load("configs/tiny.yaml", ["model.path=runs/other/final", "seed=3"])
    warm_start = train.warm_start_config(config)
    assert warm_start.model.path == "runs/other/final"
    assert warm_start.seed == 3


def test_a_resumed_stream_uses_the_corrected_answers_of_the_data():
    def problem(number, answer, question="1+1="):
        return Problem(id=f"p{number}", question=question, answer=answer, source="s")

    state = {
        "number": 9,
        "items": [
            {"number": 7, "problem": asdict(problem(0, r"\frac{")), "scored": None},
            {"number": 8, "problem": asdict(problem(1, r"\frac{")), "scored": None},
        ],
    }
    data = {"mine": [problem(0, "2"), problem(1, "3", question="another problem")]}
    current = train._with_current_problems(state, data)
    assert [item["problem"]["answer"] for item in current["items"]] == ["2", r"\frac{"]
    assert [item["number"] for item in current["items"]] == [7, 8]
    assert current["number"] == 9


def test_run_directory_as_model_path_raises_and_names_the_final_model(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"directory of a run: use {tmp_path}/final"):
        models.resolve(str(tmp_path), None, tmp_path / "model", 0)


def test_rollouts_of_a_server_stay_within_max_staleness_and_pass_the_weight_probe(tiny, tmp_path):
    sections = {
        "train": {"rollouts": 3, "problems": 4, "group_size": 4, "max_staleness": 1},
        "rewards": {"digits:share": 1.0},
        "algorithm": {"mismatch": "tis"},
        "engine": {"servers": {"count": 1}, "timeout_s": 100},
        "checkpoint": {"every": 0},
    }
    config = tiny_config(tmp_path / "run", tiny(), **sections)
    run_grpo(write_config(tmp_path / "config.yaml", config))
    metrics = read_metrics(tmp_path / "run")
    assert all(row["probe/gap"] < 1e-4 for row in metrics)
    rollouts = metrics[1:]  # the first row is the state before training
    assert len(rollouts) == 3
    assert all(row["staleness/max"] <= 1 for row in rollouts)
