"""Complete runs on one GPU, each with an engine of its own."""

import pytest
from tiny_models import tiny_config
from whole_runs import read_metrics, run_grpo, write_config

from grpo.training.weight_sync import MAX_GAP_LOW_PRECISION

from .gpu_helpers import report

pytestmark = [pytest.mark.gpu, pytest.mark.engine]


def run_config(run_dir, model_dir):
    return tiny_config(
        run_dir,
        model_dir,
        model={"dtype": "bfloat16"},
        learner={"zero_stage": 1},
        train={"rollouts": 3, "problems": 4, "group_size": 4},
    )


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="zero-1"),
        pytest.param(
            ["learner.zero_stage=3", "model.gradient_checkpointing=true"],
            id="zero-3-gradient-checkpointing",
        ),
        pytest.param(["engine.sleep=false"], id="no-sleep"),
    ],
)
def test_a_run_on_one_gpu_passes_the_probe_at_every_step(tiny, tmp_path, overrides):
    config = run_config(tmp_path / "run", tiny())
    config_path = write_config(tmp_path / "config.yaml", config)
    run_grpo(config_path, "engine.memory_fraction=0.2", "engine.kv_cache_gb=null", *overrides)
    rows = read_metrics(tmp_path / "run")
    gaps = [row["probe/gap"] for row in rows]
    report_run(" ".join(overrides) or "zero_stage=1", rows)
    assert len(gaps) == 4  # before the first rollout and after each rollout
    assert max(gaps) < MAX_GAP_LOW_PRECISION


def report_run(case, rows):
    """Reports the largest gap of a run, and speed and times of its last rollout."""
    report(f"{case}, largest gap of a probe", max(row["probe/gap"] for row in rows), "nats")
    last = rows[-1]
    report(f"{case}, sampling in the last rollout", last["rollout/tokens_per_s"], "tokens/s")
    report(f"{case}, last step", last["time/total_s"], "s")
    report(f"{case}, last sync", last["sync/seconds"], "s")
