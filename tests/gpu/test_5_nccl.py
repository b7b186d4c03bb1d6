"""Weights that travel by NCCL to a vLLM server on another GPU. Needs two GPUs."""

import pytest
import torch
from tiny_models import tiny_config
from whole_runs import read_metrics, run_grpo, write_config

from grpo.training.weight_sync import MAX_GAP_LOW_PRECISION

from .gpu_helpers import report

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def run_config(run_dir, model_dir, staleness):
    return tiny_config(
        run_dir,
        model_dir,
        model={"dtype": "bfloat16"},
        learner={"zero_stage": 1},
        engine={
            "servers": {"count": 1, "transfer": "nccl"},
            "timeout_s": 200,
            "memory_fraction": 0.2,
            "kv_cache_gb": None,
        },
        train={"rollouts": 3, "problems": 4, "group_size": 4, "max_staleness": staleness},
    )


@pytest.mark.parametrize("staleness", [0, 1])
def test_nccl_delivers_the_weights_to_a_server_on_another_gpu(tiny, tmp_path, staleness):
    config = run_config(tmp_path / "run", tiny(), staleness)
    run_grpo(write_config(tmp_path / "config.yaml", config))
    rows = read_metrics(tmp_path / "run")
    max_gap = max(row["probe/gap"] for row in rows)
    report(f"max_staleness={staleness}, largest gap of a probe", max_gap, "nats")
    last = rows[-1]
    megabytes = last["sync/bytes"] / 1e6
    report(f"max_staleness={staleness}, sync of {megabytes:.2f} MB", last["sync/seconds"], "s")
    assert max_gap < MAX_GAP_LOW_PRECISION
