"""Commands that are stopped and resumed. A resumed run must not repeat finished work."""

import json
import shutil
import subprocess

import pytest
import torch
from stage_configs import (
    collect_config,
    distill_config,
    eval_config,
    final_weights,
    sft_config,
)
from tiny_models import tiny_config
from whole_runs import (
    read_metrics,
    run_grpo,
    start_grpo,
    untimed,
    wait_for,
    write_config,
    write_yaml,
)

from grpo.metrics.cpu import int4_obstacle
from grpo.stages.eval_table import evaluation_metrics

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def read_json(path):
    return json.loads(path.read_text())


def read_json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def kill(process):
    process.kill()
    process.communicate()


def write_pipeline(tmp_path, model):
    """Writes the config of a pipeline of `sft` and `train` with one evaluation set."""
    sft = {
        "run_dir": "x",  # replaced by the pipeline
        "model": {"path": model, "dtype": "float32"},
        "data": {"name": "arithmetic", "options": {"digits": 1}},
        "prompt": {"template": "plain", "max_tokens": 48},
        "sft": {"updates": 3, "batch_size": 2, "max_tokens": 96},
        "learner": {"zero_stage": 1},
        "logging": {"progress": "off"},
    }
    sft_config_file = write_yaml(tmp_path / "sft.yaml", sft)
    train = tiny_config("x", model, train={"rollouts": 2}, eval={"every": 1, "problems": 3})
    train_config_file = write_config(tmp_path / "train.yaml", train)
    pipeline = {
        "run_dir": str(tmp_path / "run"),
        "stages": {
            "cold": {"command": "sft", "config": sft_config_file},
            "rl": {"command": "train", "config": train_config_file, "model": "cold"},
        },
        "eval": {"sums": {"config": train_config_file, "start": False}},
    }
    return write_yaml(tmp_path / "chain.yaml", pipeline)


def test_killed_pipeline_resumes_the_unfinished_stage_and_skips_finished_ones(tiny, tmp_path):
    config = write_pipeline(tmp_path, str(tiny()))
    run_dir = tmp_path / "run"
    process = start_grpo(config, command="pipeline")
    wait_for(lambda: (run_dir / "rl" / "checkpoints" / "step-000001").exists(), process)
    kill(process)
    # Mark the first evaluation as unfinished too.
    unfinished = run_dir / "cold-sums" / "manifest.json"
    unfinished.write_text(unfinished.read_text().replace('"finished"', '"running"'))
    cold_manifest = (run_dir / "cold" / "manifest.json").read_text()

    errors = run_grpo(config, command="pipeline")
    assert "== rl: " in errors
    assert "--resume" in errors
    assert "== cold-sums: " in errors
    assert "== cold: " not in errors
    assert (run_dir / "cold" / "manifest.json").read_text() == cold_manifest
    table = read_json(run_dir / "table.json")
    assert [row["stage"] for row in table] == ["cold", "rl"]
    assert all("accuracy" in row["sums"] for row in table)
    assert (run_dir / "table.md").read_text().startswith("| stage | sums |")

    # The finished stages had another seed, so the pipeline refuses to continue.
    assert "seed was 0, is 1" in run_grpo(config, "seed=1", command="pipeline", code=2)


def eval_output(*arguments):
    """Returns the standard output of `grpo eval`."""
    process = start_grpo(*arguments, command="eval", stdout=subprocess.PIPE)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def test_killed_evaluation_resumes_with_the_same_samples_and_the_same_table(tiny, tmp_path):
    sets = {
        "easy": {"name": "arithmetic", "options": {"digits": 1}},
        "hard": {"name": "arithmetic", "options": {"digits": 2}},
    }
    model = tiny()
    (tmp_path / "a").mkdir()
    run_grpo(eval_config(tmp_path / "a", model, sets=sets, chunk=2), command="eval")
    expected_dir = tmp_path / "a" / "run"

    config = eval_config(tmp_path, model, sets=sets, chunk=2)
    run_dir = tmp_path / "run"
    samples = run_dir / "samples"
    process = start_grpo(config, command="eval")
    wait_for(lambda: (samples / "part-easy-000001.jsonl").exists(), process)
    kill(process)
    # Mark a completion of the first chunk, to detect whether the chunk is sampled again.
    first_chunk = samples / "part-easy-000000.jsonl"
    marked = first_chunk.read_text().replace('"completion": "', '"completion": "KEPT', 1)
    first_chunk.write_text(marked)
    errors = run_grpo(config, "eval.temperature=0.5", "--resume", command="eval", code=2)
    assert "eval.temperature was 1.0, is 0.5" in errors

    run_grpo(config, "--resume", command="eval")
    assert sorted(path.name for path in samples.iterdir()) == ["eval-easy.jsonl", "eval-hard.jsonl"]
    easy = (samples / "eval-easy.jsonl").read_text()
    hard = (samples / "eval-hard.jsonl").read_text()
    assert easy.count("KEPT") == 1
    assert hard.count("KEPT") == 0
    assert easy.replace("KEPT", "") == (expected_dir / "samples" / "eval-easy.jsonl").read_text()
    assert hard == (expected_dir / "samples" / "eval-hard.jsonl").read_text()
    assert untimed(read_json(run_dir / "table.json")) == untimed(
        read_json(expected_dir / "table.json")
    )

    (row,) = read_metrics(run_dir)
    hard_samples = read_json_lines(samples / "eval-hard.jsonl")
    sampled = [sample for sample in hard_samples if not sample["greedy"]]
    assert row["eval/hard/accuracy"] == evaluation_metrics(sampled)["accuracy"]
    assert "eval/easy/greedy/mean" in row
    assert "second - first: +0.0%" in eval_output(str(run_dir), str(expected_dir))
    assert eval_output(str(model), "--ask", "1+1=").strip()


def texts_without_invalid_bytes(samples):
    """Returns the completions without the characters that replace bytes that are not UTF-8."""
    return [sample["completion"].replace("\ufffd", "") for sample in samples]


def test_engine_endpoint_and_ask_give_the_same_answers(vllm_server, tiny, tmp_path):
    engine_dir = tmp_path / "engine"
    endpoint_dir = tmp_path / "endpoint"
    config = eval_config(tmp_path, tiny())
    common = ["eval={protocol: greedy, problems: 4}", "sampling.max_tokens=12"]
    endpoint = [f"endpoint={{url: {vllm_server}, model: teacher}}", "prompt.template=chat"]
    run_grpo(config, f"run_dir={engine_dir}", *common, command="eval")
    run_grpo(config, f"run_dir={endpoint_dir}", *common, *endpoint, command="eval")
    for run_dir in (engine_dir, endpoint_dir):
        assert read_metrics(run_dir)[0]["eval/accuracy"] == 0
        assert (run_dir / "table.md").exists()

    samples = read_json_lines(engine_dir / "samples" / "eval-000000.jsonl")
    endpoint_samples = read_json_lines(endpoint_dir / "samples" / "eval-000000.jsonl")
    texts = texts_without_invalid_bytes(samples)
    assert texts == texts_without_invalid_bytes(endpoint_samples)
    assert len(texts) == 4
    assert any(texts)

    shutil.copytree(tiny(), engine_dir / "final")
    answer = eval_output(str(engine_dir), "--ask", samples[0]["question"])
    assert answer.strip() == samples[0]["completion"].strip()


def test_resumed_collection_ends_with_the_same_traces(tiny, tmp_path):
    config = collect_config(tmp_path, tiny())
    run_dir = tmp_path / "run"
    run_grpo(config, command="collect")
    traces = (run_dir / "traces.jsonl").read_text()
    num_traces = len(traces.splitlines())
    manifest = read_json(run_dir / "manifest.json")
    assert manifest["status"] == "finished"
    assert manifest["counts"]["kept"] == num_traces
    assert num_traces > 0
    # 6 problems x 4 completions in 3 chunks
    assert sum(manifest["counts"].values()) == 6 * 4
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2, 3]

    # Remove the results of the last chunk.
    (run_dir / "traces.jsonl").unlink()
    (run_dir / "samples" / "chunk-000003.jsonl").unlink()
    metric_lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    (run_dir / "metrics.jsonl").write_text("\n".join(metric_lines[:2]) + "\n")
    run_grpo(config, "--resume", command="collect")
    assert (run_dir / "traces.jsonl").read_text() == traces


def test_killed_and_resumed_sft_equals_the_uninterrupted_run(tiny, tmp_path):
    sections = {
        "model": {"dtype": "bfloat16"},
        "learner": {"zero_stage": 1},
        "sft": {"updates": 40},
        "checkpoint": {"every": 10},
    }
    expected_dir = tmp_path / "uninterrupted"
    uninterrupted_config = sft_config(expected_dir, tiny(), **sections)
    run_grpo(write_config(tmp_path / "a.yaml", uninterrupted_config), command="sft")

    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "b.yaml", sft_config(run_dir, tiny(), **sections))
    process = start_grpo(config, command="sft")
    wait_for(lambda: (run_dir / "checkpoints" / "step-000010").exists(), process)
    kill(process)
    run_grpo(config, "--resume", command="sft")
    assert untimed(read_metrics(run_dir)) == untimed(read_metrics(expected_dir))
    expected_weights = final_weights(expected_dir)
    weights = final_weights(run_dir)
    for name in expected_weights:
        assert torch.equal(weights[name], expected_weights[name]), name
    assert read_json(run_dir / "manifest.json")["status"] == "finished"


def write_quantize_config(tmp_path, model_dir):
    """Writes the config of `grpo quantize` for a model with an extended context."""
    sections = {"run_dir", "model", "data", "prompt", "sampling", "engine"}
    tree = tiny_config(tmp_path / "run", model_dir).model_dump(mode="json", include=sections)
    tree["model"]["rope"] = {"type": "yarn", "factor": 2.0}
    tree["quantize"] = {"schemes": ["int8", "int4"]}
    tree["eval"] = {"problems": 4}
    tree["rewards"] = {"accuracy": 1.0}
    return write_yaml(tmp_path / "config.yaml", tree)


def test_quantize_writes_every_scheme_and_one_table_and_skips_finished_schemes(tiny, tmp_path):
    config = write_quantize_config(tmp_path, tiny())
    run_dir = tmp_path / "run"
    run_grpo(config, command="quantize")
    table = (run_dir / "table.md").read_text()
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert names == ["parent", "int8", "int4"]
    rows = read_json(run_dir / "table.json")
    sizes = [row["megabytes"] for row in rows]
    assert sizes[0] > sizes[1] > sizes[2]
    can_run_int4 = int4_obstacle() is None
    assert [row["accuracy"] != "" for row in rows] == [True, True, can_run_int4]
    for scheme in ("int8", "int4"):  # the quantized models have the extended context
        model_config = read_json(run_dir / scheme / "config.json")
        assert model_config["rope_parameters"]["rope_type"] == "yarn", model_config
    manifest = read_json(run_dir / "manifest.json")
    assert manifest["status"] == "finished"
    assert manifest["final"] == "int8"

    # Remove the last scheme. The evaluation of the first must not be repeated.
    int8_metrics = read_metrics(run_dir / "eval-int8")
    shutil.rmtree(run_dir / "int4")
    (run_dir / "eval-int4" / "manifest.json").unlink(missing_ok=True)  # none without a kernel
    run_grpo(config, "--resume", command="quantize")
    assert (run_dir / "table.md").read_text() == table
    assert read_metrics(run_dir / "eval-int8") == int8_metrics


def test_teacher_top_logprobs_are_computed_once_and_approximate_the_full_distribution(
    tiny, tmp_path
):
    run_dir = tmp_path / "run"
    soft = {"updates": 6, "batch_size": 8, "max_tokens": 96}
    run_grpo(distill_config(tmp_path, tiny, way="soft", soft=soft), command="distill")
    full_metrics = read_metrics(run_dir)
    run_dir.rename(tmp_path / "full")

    soft["teacher_topk"] = 255
    config = distill_config(tmp_path, tiny, way="soft", soft=soft, checkpoint={"every": 3})
    run_grpo(config, command="distill")
    for row, full_row in zip(read_metrics(run_dir), full_metrics, strict=True):
        expected = pytest.approx(full_row["policy/divergence"], rel=0.02)
        assert row["policy/divergence"] == expected

    (logprobs_file,) = (run_dir / "teacher_top").glob("*.safetensors")
    written_at = logprobs_file.stat().st_mtime_ns
    weights = (run_dir / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(run_dir / "checkpoints" / "step-000006")
    run_grpo(config, "--resume", command="distill")
    assert logprobs_file.stat().st_mtime_ns == written_at
    assert (run_dir / "final" / "model.safetensors").read_bytes() == weights


def test_run_stopped_by_a_failing_reward_endpoint_resumes_with_every_step(
    judge_server, tiny, tmp_path
):
    url, _, handler = judge_server
    options = {"url": url, "model": "rm", "kind": "classify", "everywhere": True, "retries": 0}
    sections = {
        "rewards": {"preference": {"weight": 1.0, "options": options}},
        "train": {"rollouts": 6, "problems": 2, "group_size": 2},
        "checkpoint": {"every": 0},
        "eval": {"every": 0},
    }
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", tiny_config(run_dir, tiny(), **sections))
    process = start_grpo(config)
    wait_for(lambda: (run_dir / "samples" / "step-000002.jsonl").exists(), process)
    handler.error_status = 500
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"rewards.preference: {url}: InternalServerError" in errors

    handler.error_status = None
    run_grpo(config, "--resume")
    steps = [row["step"] for row in read_metrics(run_dir) if "reward/preference" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
