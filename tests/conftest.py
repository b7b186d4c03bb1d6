"""Fixtures that several folders use, and how tests are distributed over workers."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch
from tiny_models import MLA, TINY_SHAPE

from grpo.run.quiet import QUIET_ENVIRONMENT

# Tests never access the Hugging Face hub. Set before the first import of huggingface_hub.
os.environ.update(QUIET_ENVIRONMENT | {"HF_HUB_OFFLINE": "1"})
from grpo.learning import models

hypothesis.settings.register_profile("grpo", deadline=None)  # a busy machine may be slow
hypothesis.settings.load_profile("grpo")


def pytest_configure(config):
    """Restricts each of several workers, and the processes that it starts, to its own cores."""
    cores = sorted(os.sched_getaffinity(0))
    if "PYTEST_XDIST_WORKER" in os.environ:  # in a worker
        worker_index = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        num_workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cores_per_worker = max(1, len(cores) // num_workers)
        start = worker_index * cores_per_worker % len(cores)
        os.sched_setaffinity(0, cores[start : start + cores_per_worker])
        return
    num_workers = config.getoption("numprocesses", None)
    if num_workers:  # in the process that starts the workers
        # A worker's OpenMP reads this variable when it is loaded, before the affinity above is set.
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(cores) // num_workers))


# Files that take a minute or more, longest first. A worker runs all tests of a file
# (--dist loadfile), so that module fixtures are created once. The short files come last and keep
# all workers busy until the end.
LONG_FILES = (
    "stages/test_train.py",
    "local/test_engine.py",
    "servers/test_pool.py",
    "run/test_ranks.py",
    "stages/test_sft.py",
    "stages/test_distill.py",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=_file_order)


def _file_order(item) -> int:
    for index, name in enumerate(LONG_FILES):
        if item.path.match(name):
            return index
    return len(LONG_FILES)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Returns `make(kind, **overrides)`, which returns the directory of a tiny model.

    A model has about 100,000 random weights. They are large enough that its distributions are far
    from uniform. Equal arguments return the same directory.
    """
    directories: dict[str, Path] = {}

    def make(kind: str = "tiny-qwen2", **overrides) -> Path:
        key = f"{kind}-{sorted(overrides.items())}"
        if key not in directories:
            directories[key] = tmp_path_factory.mktemp(kind)
            shape = TINY_SHAPE | {"initializer_range": 0.1} | MLA.get(kind, {}) | overrides
            models.make_tiny(kind, directories[key], 0, **shape)
        return directories[key]

    return make


@pytest.fixture(scope="module")
def pool_messages():
    """The messages of the fixture `pool`."""
    return []


@pytest.fixture(scope="module")
def pool(tiny, tmp_path_factory, pool_messages):
    """A pool of two real servers. It has received the tiny model's weights as version 1."""
    from server_pools import model_weights, start_pool

    pool = start_pool(tiny(), tmp_path_factory.mktemp("pool"), pool_messages)
    pool.wait_ready()
    pool.load_weights(model_weights(tiny()), 1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def vllm_server(tiny, tmp_path_factory):
    """The URL of a real vLLM server on a tiny model."""
    from http_servers import serve_vllm

    with serve_vllm(tiny(), tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture
def judge_server():
    """A scripted reward server (`JudgeServer`)."""
    from http_servers import serve_judge

    with serve_judge() as server:
        yield server
