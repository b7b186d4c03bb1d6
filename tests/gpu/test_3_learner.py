"""The learner in bfloat16 under ZeRO 1 to 3, with and without offloading of the optimizer."""

import pytest
import torch
from tiny_models import tiny_config
from training_samples import random_samples

from grpo.learning import models
from grpo.learning.batch import micro_batches
from grpo.learning.learner import Learner
from grpo.losses.grpo import loss

from .gpu_helpers import report

pytestmark = pytest.mark.gpu


def learner_config(folder, model_dir, dtype, stage, *, offload):
    settings = {"lr": 1e-3, "zero_stage": stage, "offload_optimizer": offload}
    return tiny_config(folder, model_dir, model={"dtype": dtype}, learner=settings)


def copy_weights(learner):
    return {name: weight.float().cpu() for name, weight in learner.weights()}


def assert_equal_weights(actual, expected):
    assert actual.keys() == expected.keys()
    for name, weight in actual.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_updates_in_bfloat16_match_updates_in_float32(tiny, tmp_path, stage, offload):
    """The gradient norms agree, and a checkpoint restores the weights bit for bit."""
    case = f"ZeRO-{stage}, offload_optimizer={offload}"
    grad_norms = {}
    for dtype in ("float32", "bfloat16"):
        config = learner_config(tmp_path, tiny(), dtype, stage, offload=offload)
        learner = Learner(models.load_model(tiny(), "packed"), config, loss)
        packed = micro_batches(random_samples(), [1 / 100] * 10, max_tokens=1000, packed=True)
        updates = [learner.update(packed) for _ in range(4)]
        grad_norms[dtype] = [metrics["policy/grad_norm"] for metrics in updates]
        report(f"{case}, fourth update in {dtype}", updates[-1]["update/seconds"], "s")
        saved = copy_weights(learner)
        learner.save(tmp_path / dtype)
        learner.update(packed)
        learner.load(tmp_path / dtype)
        assert_equal_weights(copy_weights(learner), saved)
    differences = []
    for low_precision, expected in zip(grad_norms["bfloat16"], grad_norms["float32"], strict=True):
        differences.append(abs(low_precision - expected) / expected)
    report(f"{case}, largest difference of a gradient norm", 100 * max(differences), "%")
    assert max(differences) < 0.05
