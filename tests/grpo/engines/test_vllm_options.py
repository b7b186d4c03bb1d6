"""The arguments of vLLM's engine on a CPU and on a GPU."""

import pytest

from grpo.config import EngineSettings
from grpo.engines.vllm_options import ServedModel, llm_arguments

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
