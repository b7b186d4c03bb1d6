"""What all tests share: how they are spread over workers, tiny models, a pool of servers."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch
from tiny_models import MLA, TINY_SHAPE

from grpo.cli import QUIET_ENVIRONMENT

# before anything of the hub is imported: no test asks it
os.environ.update(QUIET_ENVIRONMENT | {"HF_HUB_OFFLINE": "1"})
from grpo.learning import models

hypothesis.settings.register_profile("grpo", deadline=None)  # a busy machine is no bug
hypothesis.settings.load_profile("grpo")


def pytest_configure(config):
    """Holds each of several workers, and all that it starts, to its share of the cores."""
    cores = sorted(os.sched_getaffinity(0))
    if "PYTEST_XDIST_WORKER" in os.environ:
        number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        share = max(1, len(cores) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
        first = number * share % len(cores)
        os.sched_setaffinity(0, cores[first : first + share])
    elif workers := config.getoption("numprocesses", None):
        # Read when a worker's OpenMP is loaded, which is before the worker is held to its cores.
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(cores) // workers))


# Files that take a minute and more, longest first. A worker takes a whole file (--dist loadfile),
# so that its fixtures are made once; the small files at the end keep all workers busy.
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
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=_place)


def _place(item) -> int:
    for place, name in enumerate(LONG_FILES):
        if item.path.match(name):
            return place
    return len(LONG_FILES)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Returns `make(kind, **overrides) -> directory` of a model with about 100,000 random weights,
    big enough to have opinions.
    """
    made: dict[str, Path] = {}

    def make(kind: str = "tiny-qwen2", **overrides) -> Path:
        key = f"{kind}-{sorted(overrides.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(kind)
            models.make_tiny(
                kind,
                made[key],
                0,
                **(TINY_SHAPE | {"initializer_range": 0.1} | MLA.get(kind, {}) | overrides),
            )
        return made[key]

    return make


@pytest.fixture(scope="module")
def said():
    """What a pool of servers has said."""
    return []


@pytest.fixture(scope="module")
def pool(tiny, tmp_path_factory, said):
    """A pool of two real servers with weights 1, the tiny model's own."""
    from server_pools import pool_of, weights

    pool = pool_of(tiny(), tmp_path_factory.mktemp("pool"), said)
    pool.wait_ready()
    pool.load_weights(weights(tiny()), 1)
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
    """A server's URL, what it was asked, and its handler, whose `fail` makes it refuse."""
    from http_servers import serve_judge

    with serve_judge() as server:
        yield server
