"""The arguments and the environment of vLLM's engine on a CPU and on a GPU."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from grpo.config import EngineSettings
from grpo.engines import determinism
from grpo.engines.vllm_options import ServedModel, llm_arguments, vllm_environment
from grpo.types import UserError

MODEL = ServedModel(model_dir="model", dtype="bfloat16", max_model_len=128)
GIB = 2**30


@pytest.mark.parametrize(
    ("settings", "cuda", "cache_bytes"),
    [
        ({}, False, 2 * GIB),
        ({"kv_cache_gb": 0.5}, False, GIB // 2),
        ({}, True, None),  # vLLM measures the memory
        ({"kv_cache_gb": 0.5}, True, GIB // 2),
    ],
)
def test_size_of_the_kv_cache(settings, cuda, cache_bytes):
    arguments = llm_arguments(MODEL, EngineSettings(**settings), cuda=cuda)
    assert arguments.get("kv_cache_memory_bytes") == cache_bytes
    assert arguments.get("gpu_memory_utilization") == (0.4 if cuda else None)


def test_vllm_reads_the_variables_of_the_environment():
    """vLLM then needs no route to another machine to find an address, and changes its kernels."""
    program = """
import vllm.envs
from vllm.utils.network_utils import get_ip
print(get_ip(), vllm.envs.VLLM_BATCH_INVARIANT)
"""
    outputs = []
    for deterministic in (False, True):
        environment = vllm_environment(EngineSettings(deterministic=deterministic))
        command = [sys.executable, "-c", program]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        outputs.append(result.stdout.split())
    assert outputs == [["127.0.0.1", "False"], ["127.0.0.1", "True"]]


def test_values_that_the_user_has_set_remain(monkeypatch):
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    environment = vllm_environment(EngineSettings())
    assert environment["VLLM_HOST_IP"] == "10.0.0.7"
    assert environment["GLOO_SOCKET_IFNAME"] == "eth1"


def test_deterministic_mode_needs_kernels_for_the_gpu_and_nothing_on_a_cpu(monkeypatch):
    determinism.require_batch_invariant_kernels()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UserError, match=r"no batch-invariant kernels for NVIDIA T4 \(.* 7\.5;"):
        determinism.require_batch_invariant_kernels()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    determinism.require_batch_invariant_kernels()  # the kernels of the installed vLLM
    other_build = SimpleNamespace(submodule_search_locations=["/nowhere"])
    monkeypatch.setattr(determinism.importlib.util, "find_spec", lambda name: other_build)
    with pytest.raises(UserError, match="this build of vLLM has no batch-invariant kernels"):
        determinism.require_batch_invariant_kernels()
