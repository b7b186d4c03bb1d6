"""Weights that travel by CUDA IPC to an engine on the same GPU, and the memory of that engine.

All tests of this file use one engine, because its start takes most of the time.
"""

import time
from dataclasses import dataclass

import pytest
import torch
from real_engines import ENGINE_SETTINGS, make_learner_and_weight_check, start_engine
from training_samples import padded_batches, random_samples

from grpo.engines.local.engine import VllmEngine
from grpo.learning.learner import Learner
from grpo.training.weight_sync import WeightCheck, sync_weights

from .gpu_helpers import GIB, gpu_bytes_in_use, report

pytestmark = [pytest.mark.gpu, pytest.mark.engine]


@dataclass
class Colocated:
    """An engine and a learner that share a GPU.

    Attributes:
        engine: The engine, in bfloat16.
        learner: The learner, in float32.
        weight_check: The check that compares the two.
        engine_bytes: GPU memory that the start of the engine has taken, in bytes.
    """

    engine: VllmEngine
    learner: Learner
    weight_check: WeightCheck
    engine_bytes: int

    def sync_and_probe(self, version):
        """Sends the weights, compares the logprobs, and reports times and gap."""
        sync = sync_weights(self.engine, self.learner, version)
        megabytes = sync.num_bytes / 1e6
        report(f"sync {version}, {megabytes:.2f} MB over CUDA IPC", sync.seconds, "s")
        start = time.monotonic()
        probe = self.weight_check.probe()
        report(f"probe after sync {version}", time.monotonic() - start, "s")
        report(f"gap of the probe after sync {version}", probe.gap, "nats")


@pytest.fixture(scope="module")
def colocated(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("colocated")
    bytes_before_start = gpu_bytes_in_use()  # with the CUDA context of this process
    start = time.monotonic()
    engine = start_engine(tiny(), folder, dtype="bfloat16")
    try:
        engine.wait_ready()  # before the learner allocates GPU memory
        report("start of the engine", time.monotonic() - start, "s")
        engine_bytes = gpu_bytes_in_use() - bytes_before_start
        learner, weight_check = make_learner_and_weight_check(
            engine, tiny(), folder, is_low_precision=True
        )
        yield Colocated(
            engine=engine, learner=learner, weight_check=weight_check, engine_bytes=engine_bytes
        )
    finally:
        engine.close()


def test_cuda_ipc_delivers_the_weights(colocated):
    start = time.monotonic()
    gap = colocated.weight_check.canary(version=0)
    report("canary", time.monotonic() - start, "s")
    report("gap of the canary", gap, "nats")
    colocated.sync_and_probe(version=1)  # the canary has left perturbed weights


def test_cuda_ipc_delivers_the_weights_after_an_update_and_sleep(colocated):
    colocated.learner.update(padded_batches(random_samples(), 1000))
    bytes_awake = gpu_bytes_in_use()
    start = time.monotonic()
    colocated.engine.sleep()
    report("sleep", time.monotonic() - start, "s")
    freed_bytes = bytes_awake - gpu_bytes_in_use()
    report("memory that sleep frees", freed_bytes / GIB, "GiB")
    start = time.monotonic()
    colocated.engine.wake()
    report("wake", time.monotonic() - start, "s")
    colocated.sync_and_probe(version=2)  # sleep has discarded the weights
    # Almost all memory of an engine with a tiny model is its KV cache.
    assert freed_bytes > colocated.engine_bytes / 2


def test_the_engine_uses_at_most_its_fraction_of_the_memory(colocated):
    """Allows 1 GiB in addition, for the CUDA context of the engine's process."""
    _, total_bytes = torch.cuda.mem_get_info()
    limit = ENGINE_SETTINGS.memory_fraction * total_bytes
    report("memory of the engine", colocated.engine_bytes / GIB, "GiB")
    report(f"engine.memory_fraction={ENGINE_SETTINGS.memory_fraction}", limit / GIB, "GiB")
    assert colocated.engine_bytes <= limit + GIB
