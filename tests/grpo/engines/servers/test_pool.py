"""Two real vLLM servers.

What they sample, who may ask them, what is done when one is killed, hangs or gets broken weights.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from server_pools import OPTIONS, REQUESTS, pool_of, settings, weights
from tiny_models import tiny_config
from whole_runs import wait_for

from grpo import config as configs
from grpo.engines.local.engine import VllmEngine
from grpo.engines.servers.guard import TOKEN_VARIABLE
from grpo.engines.servers.supervisor import sample_gap
from grpo.engines.vllm_options import ServedModel
from grpo.run import ranks
from grpo.types import UserError

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[4]


def test_two_servers_sample_what_one_child_process_samples(pool, tiny, tmp_path):
    model = ServedModel(
        model_dir=str(tiny()), dtype="float32", max_model_len=160, load_weights=True
    )
    engine = VllmEngine(model=model, settings=settings(), log_file=tmp_path / "log")
    expected = engine.generate(REQUESTS, OPTIONS)
    engine.close()
    done = []
    found = pool.generate(REQUESTS, OPTIONS, lambda *progress: done.append(progress))
    num_tokens = [
        pool._loop.run(pool._client.num_generated_tokens(server, 10))
        for server in pool._state.servers
    ]
    assert done[-1] == (36, 36) and all(count > 0 for count in num_tokens)  # both had work
    for ours, theirs in zip(found, expected, strict=True):
        assert [(c.token_ids, c.text, c.finish_reason) for c in ours] == [
            (c.token_ids, c.text, c.finish_reason) for c in theirs
        ]
        assert all(c.versions == ((1, 0, 24),) for c in ours)
        for a, b in zip(ours, theirs, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_every_route_asks_for_the_token_and_pickles_are_not_served(pool):
    url, token = pool._state.servers[0].url, pool._state.servers[0].environment[TOKEN_VARIABLE]
    for method, path in (
        ("GET", "/health"),
        ("POST", "/update_weights"),
        ("POST", "/inference/v1/generate"),
        ("POST", "/pause"),
        ("GET", "/docs"),
    ):
        assert httpx.request(method, url + path).status_code == 401
        assert (
            httpx.request(
                method, url + path, headers={"Authorization": "Bearer " + token[:-1]}
            ).status_code
            == 401
        )
    right = {"Authorization": f"Bearer {token}"}
    assert (
        httpx.post(url + "/collective_rpc", headers=right, json={"method": "x"}).status_code == 403
    )
    assert httpx.get(url + "/health", headers=right).status_code == 200
    assert url.startswith("http://127.0.0.1:")


def test_new_weights_reach_every_server_and_their_prefixes_are_not_those_of_the_old(pool, tiny):
    before = pool.prove(REQUESTS[:4], OPTIONS)
    pool.load_weights(weights(tiny(), 0.7), 2)
    after = pool.prove(REQUESTS[:4], OPTIONS)
    assert len(after) == 2 and sample_gap(after[0], after[1]) < 1e-4 < sample_gap(
        before[0], after[0]
    )
    pool.load_weights(weights(tiny()), 3)
    assert sample_gap(before[0], pool.prove(REQUESTS[:4], OPTIONS)[1]) < 1e-4


def test_a_server_whose_trainer_was_killed_while_it_started_ends():
    dead = subprocess.Popen(["true"])
    dead.wait()
    program = f"""import os, subprocess; from grpo.engines.servers.plugin import _end_with
print(subprocess.Popen(['sleep', '60']).pid, flush=True); _end_with(os.getppid(), {dead.pid})"""
    server = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    core = int(server.stdout.readline())
    assert server.wait(timeout=60) == -signal.SIGKILL
    wait_for(
        lambda: (
            not psutil.pid_exists(core) or psutil.Process(core).status() == psutil.STATUS_ZOMBIE
        ),
        seconds=5,
    )


def test_what_cannot_be_is_told_before_anything_starts(tiny, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="needs GPUs on both sides"):
        pool_of(tiny(), tmp_path, transfer="nccl")
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "world_size", lambda: 4)
        patch.setattr(ranks, "local_world_size", lambda: 2)
        with pytest.raises(
            UserError,
            match=r"engine.servers.count: ranks on several "
            r"machines do not reach rank 0's own: use urls",
        ):
            pool_of(tiny(), tmp_path)
    with pytest.raises(UserError, match="tensor_parallel=3 does not divide the model's 2 heads"):
        pool_of(tiny(), tmp_path, tensor_parallel=3)
    monkeypatch.delenv("GRPO_ENGINE_TOKEN", raising=False)
    with pytest.raises(UserError, match="GRPO_ENGINE_TOKEN is not set"):
        pool_of(tiny(), tmp_path, count=0, urls=["http://127.0.0.1:9"])
    for servers, message in (
        ({}, "set count"),
        ({"urls": ["http://x"], "transfer": "memory"}, "reaches servers on this machine only"),
    ):
        with pytest.raises(UserError, match=message):
            configs.parse(
                {"engine": {"servers": servers}}
                | json.loads(
                    json.dumps(tiny_config(tmp_path, tiny()).model_dump(exclude={"engine"}))
                )
            )


def test_staleness_needs_servers(tiny, tmp_path):
    with pytest.raises(UserError, match="max_staleness needs servers"):
        tiny_config(tmp_path, tiny(), train={"rollouts": 1, "max_staleness": 1})
