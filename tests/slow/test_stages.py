"""The other commands killed and continued: what is finished is not done again."""

import json
import shutil
import subprocess

import pytest
import torch
import yaml
from stage_configs import (
    collect_config,
    distill_config,
    eval_config,
    final_weights,
    sft_config,
)
from tiny_models import tiny_config
from whole_runs import rows, run, start, wait_for, write_config

from grpo import config as configs
from grpo.config import SftConfig
from grpo.stages.eval import summary

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_a_chain_killed_in_a_stage_goes_on_and_is_not_begun_again(tiny, tmp_path):
    model = str(tiny())
    supervised = {
        "run_dir": "x",
        "model": {"path": model, "dtype": "float32"},
        "data": {"name": "arithmetic", "options": {"digits": 1}},
        "prompt": {"template": "plain", "max_tokens": 48},
        "sft": {"updates": 3, "batch_size": 2, "max_tokens": 96},
        "learner": {"zero_stage": 1},
        "logging": {"progress": "off"},
    }
    configs.parse(supervised, kind=SftConfig)
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(supervised))
    train = write_config(
        tmp_path / "train.yaml",
        tiny_config("x", model, train={"rollouts": 2}, eval={"every": 1, "problems": 3}),
    )
    tree = {
        "run_dir": str(tmp_path / "run"),
        "stages": {
            "cold": {"command": "sft", "config": str(tmp_path / "sft.yaml")},
            "rl": {"command": "train", "config": train, "model": "cold"},
        },
        "eval": {"sums": {"config": train, "start": False}},
    }
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(tree))
    config = str(tmp_path / "chain.yaml")
    process = start(config, command="pipeline")
    wait_for(lambda: (tmp_path / "run" / "rl" / "checkpoints" / "step-000001").exists(), process)
    process.kill()
    process.communicate()
    # as if it had been killed there too
    unfinished = tmp_path / "run" / "cold-sums" / "manifest.json"
    unfinished.write_text(unfinished.read_text().replace('"finished"', '"running"'))
    cold = (tmp_path / "run" / "cold" / "manifest.json").read_text()
    errors = run(config, command="pipeline")
    assert (
        "== rl: " in errors
        and "--resume" in errors
        and "== cold: " not in errors
        and "== cold-sums: " in errors
    )
    assert (tmp_path / "run" / "cold" / "manifest.json").read_text() == cold
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert [row["stage"] for row in table] == ["cold", "rl"] and all(
        "accuracy" in row["sums"] for row in table
    )
    assert (tmp_path / "run" / "table.md").read_text().startswith("| stage | sums |")
    # what is finished was another run
    assert "seed was 0, is 1" in run(config, "seed=1", command="pipeline", code=2)


def test_killed_between_chunks_it_goes_on_with_the_same_samples_and_the_same_table(tiny, tmp_path):
    sets = {
        "easy": {"name": "arithmetic", "options": {"digits": 1}},
        "hard": {"name": "arithmetic", "options": {"digits": 2}},
    }
    model = tiny()
    (tmp_path / "a").mkdir()
    run(eval_config(tmp_path / "a", model, sets=sets, chunk=2), command="eval")
    config = eval_config(tmp_path, model, sets=sets, chunk=2)
    process = start(config, command="eval")
    samples = tmp_path / "run" / "samples"
    wait_for(lambda: (samples / "part-easy-000001.jsonl").exists(), process)
    process.kill()
    process.communicate()
    part = samples / "part-easy-000000.jsonl"
    part.write_text(part.read_text().replace('"completion": "', '"completion": "KEPT', 1))
    assert "eval.temperature was 1.0, is 0.5" in run(
        config, "eval.temperature=0.5", "--resume", command="eval", code=2
    )
    run(config, "--resume", command="eval")
    names = ["eval-easy.jsonl", "eval-hard.jsonl"]
    assert sorted(path.name for path in samples.iterdir()) == names
    for name in names:
        text = (samples / name).read_text()
        assert text.count("KEPT") == (name == names[0])  # what was written was not sampled again
        assert text.replace("KEPT", "") == (tmp_path / "a" / "run" / "samples" / name).read_text()
    assert (tmp_path / "run" / "table.md").read_text() == (
        tmp_path / "a" / "run" / "table.md"
    ).read_text()
    (row,) = rows(tmp_path / "run")
    kept = [json.loads(line) for line in (samples / "eval-hard.jsonl").read_text().splitlines()]
    assert (
        row["eval/hard/accuracy"] == summary([one for one in kept if not one["greedy"]])["accuracy"]
        and "eval/easy/greedy/mean" in row
    )
    assert "second - first: +0.0%" in _printed(tmp_path)
    assert _printed(tmp_path, str(model), "--ask", "1+1=").strip()


def _printed(tmp_path, *arguments):
    process = start(
        *(arguments or (str(tmp_path / "run"), str(tmp_path / "a" / "run"))),
        command="eval",
        stdout=-1,
    )
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out


def test_the_same_answers_come_from_a_directory_from_an_endpoint_and_to_one_who_asks(
    vllm_server, tiny, tmp_path
):
    made, shown = {}, ["eval={protocol: greedy, problems: 4}", "sampling.max_tokens=12"]
    for name, more in {
        "own": [],
        "endpoint": [f"endpoint={{url: {vllm_server}, model: teacher}}", "prompt.template=chat"],
    }.items():
        run(
            eval_config(tmp_path, tiny()),
            f"run_dir={tmp_path / name}",
            *shown,
            *more,
            command="eval",
        )
        made[name] = [
            json.loads(line)
            for line in (tmp_path / name / "samples" / "eval-000000.jsonl").read_text().splitlines()
        ]
        assert (
            rows(tmp_path / name)[0]["eval/accuracy"] == 0
            and (tmp_path / name / "table.md").exists()
        )
    # bytes that are no text
    texts = {
        name: [row["completion"].replace("\ufffd", "") for row in found]
        for name, found in made.items()
    }
    assert texts["own"] == texts["endpoint"] and len(texts["own"]) == 4 and any(texts["own"])
    shutil.copytree(tiny(), tmp_path / "own" / "final")
    process = start(
        str(tmp_path / "own"),
        "--ask",
        made["own"][0]["question"],
        command="eval",
        stdout=subprocess.PIPE,
    )
    assert process.communicate(timeout=120)[0].strip() == made["own"][0]["completion"].strip()


def test_a_killed_collection_goes_on_and_ends_like_one_that_never_was(tiny, tmp_path):
    config = collect_config(tmp_path, tiny())
    run(config, command="collect")
    whole = (tmp_path / "run" / "traces.jsonl").read_text()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    kept = [json.loads(line) for line in whole.splitlines()]
    assert manifest["status"] == "finished" and manifest["counts"]["kept"] == len(kept) > 0
    assert sum(manifest["counts"].values()) == 6 * 4 and [
        row["step"] for row in rows(tmp_path / "run")
    ] == [1, 2, 3]
    for name in ("traces.jsonl", "samples/chunk-000003.jsonl"):
        (tmp_path / "run" / name).unlink()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n")
    run(config, "--resume", command="collect")
    assert (tmp_path / "run" / "traces.jsonl").read_text() == whole


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tiny, tmp_path):
    sections = {
        "model": {"dtype": "bfloat16"},
        "learner": {"zero_stage": 1},
        "sft": {"updates": 40},
        "checkpoint": {"every": 10},
    }
    straight = sft_config(tmp_path / "straight", tiny(), **sections)
    run(write_config(tmp_path / "a.yaml", straight), command="sft")
    config = write_config(tmp_path / "b.yaml", sft_config(tmp_path / "run", tiny(), **sections))
    process = start(config, command="sft")
    wait_for(lambda: (tmp_path / "run" / "checkpoints" / "step-000010").exists(), process)
    process.kill()
    process.communicate()
    run(config, "--resume", command="sft")

    def untimed(folder):
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(folder)]

    assert untimed(tmp_path / "run") == untimed(tmp_path / "straight")
    before, after = final_weights(tmp_path / "straight"), final_weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "finished"


def test_a_run_writes_every_scheme_and_one_table_and_goes_on_where_it_was_stopped(tiny, tmp_path):
    config = tiny_config(tmp_path / "run", tiny()).model_dump(
        mode="json", include={"run_dir", "model", "data", "prompt", "sampling", "engine"}
    )
    config |= {
        "quantize": {"schemes": ["int8", "int4"]},
        "eval": {"problems": 4},
        "rewards": {"accuracy": 1.0},
    }
    config["model"]["rope"] = {"type": "yarn", "factor": 2.0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run(str(tmp_path / "config.yaml"), command="quantize")
    table = (tmp_path / "run" / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "parent",
        "int8",
        "int4",
    ]
    sizes = [row["megabytes"] for row in json.loads((tmp_path / "run" / "table.json").read_text())]
    assert sizes[0] > sizes[1] > sizes[2]
    for scheme in ("int8", "int4"):  # a longer context is the quantised model's too
        written = json.loads((tmp_path / "run" / scheme / "config.json").read_text())
        assert written["rope_parameters"]["rope_type"] == "yarn", written
    before = rows(tmp_path / "run" / "eval-int8")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["final"] == "int8"
    (tmp_path / "run" / "int4" / "model.safetensors").unlink()
    (tmp_path / "run" / "int4").rename(tmp_path / "gone")
    (tmp_path / "run" / "eval-int4" / "manifest.json").unlink()
    run(str(tmp_path / "config.yaml"), "--resume", command="quantize")
    assert (tmp_path / "run" / "table.md").read_text() == table and rows(
        tmp_path / "run" / "eval-int8"
    ) == before


def test_the_teachers_likeliest_tokens_are_asked_for_once_and_teach_as_the_whole_distribution(
    tiny, tmp_path
):
    soft = {"updates": 6, "batch_size": 8, "max_tokens": 96}
    run(distill_config(tmp_path, tiny, way="soft", soft=soft), command="distill")
    whole = rows(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "whole")
    config = distill_config(
        tmp_path, tiny, way="soft", soft=soft | {"teacher_topk": 255}, checkpoint={"every": 3}
    )
    run(config, command="distill")
    top = rows(tmp_path / "run")
    for row, other in zip(top, whole, strict=True):
        assert row["policy/divergence"] == pytest.approx(other["policy/divergence"], rel=0.02)
    (file,) = (tmp_path / "run" / "teacher_top").glob("*.safetensors")
    before = file.stat().st_mtime_ns
    final = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    run(config, "--resume", command="distill")
    assert (
        file.stat().st_mtime_ns == before
        and (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == final
    )


def test_an_endpoint_that_goes_down_in_a_run_costs_what_was_being_done(
    judge_server, tiny, tmp_path
):
    url, _, handler = judge_server
    judged = {
        "preference": {
            "weight": 1.0,
            "options": {
                "url": url,
                "model": "rm",
                "kind": "classify",
                "everywhere": True,
                "retries": 0,
            },
        }
    }
    sections = {
        "train": {"rollouts": 6, "problems": 2, "group_size": 2},
        "checkpoint": {"every": 0},
        "eval": {"every": 0},
    }
    config = write_config(
        tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny(), rewards=judged, **sections)
    )
    process = start(config)
    wait_for(lambda: (tmp_path / "run" / "samples" / "step-000002.jsonl").exists(), process)
    handler.fail = True
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and f"rewards.preference: {url}: BadRequestError" in errors
    handler.fail = False
    run(config, "--resume")
    assert [row["step"] for row in rows(tmp_path / "run") if "reward/preference" in row] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
