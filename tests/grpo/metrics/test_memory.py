"""Estimates of memory: calculations by hand, and the largest memory fraction."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.config import EngineSettings
from grpo.metrics.memory import (
    GB,
    UNUSABLE_GPU_BYTES,
    LearnerMemory,
    cpu_engine_memory,
    gpu_engine_memory,
    max_memory_fraction,
    shared_gpu_bytes,
)

LEARNER = LearnerMemory(
    parts={"weights": 3 * GB, "gradients": 6 * GB, "optimizer": 18 * GB, "activations": 30 * GB}
)
GPU_BYTES = 80 * GB


def test_the_kv_cache_is_the_fraction_of_the_gpu_less_weights_and_reserve():
    engine = gpu_engine_memory(EngineSettings(memory_fraction=0.4), 3 * GB, GPU_BYTES)
    assert engine.total_bytes == pytest.approx(32 * GB)
    assert engine.kv_cache_bytes == pytest.approx((32 - 3 - 3) * GB)


def test_a_given_kv_cache_replaces_the_fraction():
    engine = gpu_engine_memory(EngineSettings(kv_cache_gb=10), 3 * GB, GPU_BYTES)
    assert engine.total_bytes == 16 * GB
    cpu_engine = cpu_engine_memory(EngineSettings(kv_cache_gb=10), 3 * GB)
    assert cpu_engine.total_bytes == (10 + 3 * 3 + 1.5) * GB


def test_servers_split_the_weights_over_their_gpus():
    settings = EngineSettings(servers={"count": 1, "tensor_parallel": 4})
    assert gpu_engine_memory(settings, 60 * GB, GPU_BYTES).weight_bytes == 15 * GB


def test_the_engine_sleeps_during_the_update_but_the_states_of_the_learner_stay():
    assert LEARNER.resident_bytes == 27 * GB
    assert LEARNER.update_bytes == 30 * GB
    assert shared_gpu_bytes(LEARNER, 40 * GB, sleep=True) == (27 + 40) * GB
    assert shared_gpu_bytes(LEARNER, 10 * GB, sleep=True) == (27 + 30) * GB
    assert shared_gpu_bytes(LEARNER, 40 * GB, sleep=False) == (27 + 30 + 40) * GB


def test_the_largest_memory_fraction_by_hand():
    # 80 - 4 - 27 = 49 of 80 with sleep; 80 - 4 - 57 = 19 of 80 without
    assert max_memory_fraction(LEARNER, GPU_BYTES, sleep=True) == 0.61
    assert max_memory_fraction(LEARNER, GPU_BYTES, sleep=False) == 0.23
    assert max_memory_fraction(LEARNER, 60 * GB, sleep=True) == 0.0


@given(
    resident_gb=st.floats(1, 70),
    update_gb=st.floats(0, 40),
    weights_gb=st.floats(0.1, 20),
    sleep=st.booleans(),
)
def test_an_engine_with_the_largest_memory_fraction_fits(resident_gb, update_gb, weights_gb, sleep):
    learner = LearnerMemory(parts={"weights": resident_gb * GB, "activations": update_gb * GB})
    fraction = max_memory_fraction(learner, GPU_BYTES, sleep=sleep)
    if fraction <= 0:
        return
    settings = EngineSettings(memory_fraction=fraction)
    engine = gpu_engine_memory(settings, weights_gb * GB, GPU_BYTES)
    usable_bytes = GPU_BYTES - UNUSABLE_GPU_BYTES
    assert shared_gpu_bytes(learner, engine.total_bytes, sleep=sleep) <= usable_bytes * (1 + 1e-9)
    larger_bytes = engine.total_bytes + 0.011 * GPU_BYTES
    assert shared_gpu_bytes(learner, larger_bytes, sleep=sleep) > usable_bytes
