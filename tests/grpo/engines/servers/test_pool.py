"""A pool of two real vLLM servers: sampling, authentication, weight updates and user errors."""

import signal
import subprocess
import sys

import httpx
import psutil
import pytest
from server_pools import OPTIONS, REQUESTS, engine_settings, model_weights, start_pool
from tiny_models import tiny_config
from whole_runs import wait_for

from grpo import config as configs
from grpo.engines.local.engine import VllmEngine
from grpo.engines.servers.guard import TOKEN_VARIABLE
from grpo.engines.servers.supervisor import mean_logprob_gap
from grpo.engines.vllm_options import ServedModel
from grpo.run import ranks
from grpo.types import UserError

pytestmark = pytest.mark.engine


def test_two_servers_sample_the_completions_of_one_child_process(pool, tiny, tmp_path):
    model = ServedModel(
        model_dir=str(tiny()), dtype="float32", max_model_len=160, load_weights=True
    )
    engine = VllmEngine(model=model, settings=engine_settings(), log_file=tmp_path / "log")
    engine_groups = engine.generate(REQUESTS, OPTIONS)
    engine.close()

    progress = []

    def record_progress(num_finished, num_total):
        progress.append((num_finished, num_total))

    pool_groups = pool.generate(REQUESTS, OPTIONS, record_progress)

    assert progress[-1] == (36, 36)
    for server in pool._state.servers:  # both servers have sampled
        assert pool._loop.run(pool._client.num_generated_tokens(server, 10)) > 0
    for pool_group, engine_group in zip(pool_groups, engine_groups, strict=True):
        for actual, expected in zip(pool_group, engine_group, strict=True):
            assert actual.token_ids == expected.token_ids
            assert actual.text == expected.text
            assert actual.finish_reason == expected.finish_reason
            assert actual.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
            assert actual.versions == ((1, 0, 24),)


def test_every_route_requires_the_token_and_collective_rpc_is_forbidden(pool):
    server = pool._state.servers[0]
    token = server.environment[TOKEN_VARIABLE]
    assert server.url.startswith("http://127.0.0.1:")
    wrong_token = {"Authorization": f"Bearer {token[:-1]}"}
    for method, path in (
        ("GET", "/health"),
        ("POST", "/update_weights"),
        ("POST", "/inference/v1/generate"),
        ("POST", "/pause"),
        ("GET", "/docs"),
    ):
        assert httpx.request(method, server.url + path).status_code == 401
        assert httpx.request(method, server.url + path, headers=wrong_token).status_code == 401
    right_token = {"Authorization": f"Bearer {token}"}
    # vLLM's /collective_rpc would call any method of the workers.
    response = httpx.post(server.url + "/collective_rpc", headers=right_token, json={"method": "x"})
    assert response.status_code == 403
    assert httpx.get(server.url + "/health", headers=right_token).status_code == 200


def test_new_weights_reach_every_server_and_old_prefixes_are_not_reused(pool, tiny):
    before = pool.generate_on_every_copy(REQUESTS[:4], OPTIONS)
    pool.load_weights(model_weights(tiny(), 0.7), 2)
    after = pool.generate_on_every_copy(REQUESTS[:4], OPTIONS)
    assert len(after) == 2
    assert mean_logprob_gap(after[0], after[1]) < 1e-4
    assert mean_logprob_gap(before[0], after[0]) > 1e-4
    pool.load_weights(model_weights(tiny()), 3)
    restored = pool.generate_on_every_copy(REQUESTS[:4], OPTIONS)
    assert mean_logprob_gap(before[0], restored[1]) < 1e-4


# Stands in for a server: starts an engine core, then watches a parent and a trainer as the plugin
# of a server does.
SERVER_PROGRAM = """\
import os
import subprocess
import sys

from grpo.engines.servers.plugin import _kill_orphaned_group

engine_core = subprocess.Popen(["sleep", "60"])
print(engine_core.pid, flush=True)
_kill_orphaned_group(os.getppid(), int(sys.argv[1]))
"""


def has_ended(pid):
    if not psutil.pid_exists(pid):
        return True
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_server_ends_if_its_trainer_was_killed_while_the_server_started():
    ended_trainer = subprocess.Popen(["true"])
    ended_trainer.wait()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER_PROGRAM, str(ended_trainer.pid)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    engine_core_pid = int(server.stdout.readline())
    assert server.wait(timeout=60) == -signal.SIGKILL
    wait_for(lambda: has_ended(engine_core_pid), seconds=5)


def test_unusable_server_settings_are_user_errors(tiny, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="needs GPUs on both sides"):
        start_pool(tiny(), tmp_path, transfer="nccl")
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "world_size", lambda: 4)
        patch.setattr(ranks, "local_world_size", lambda: 2)
        with pytest.raises(
            UserError,
            match=r"engine\.servers\.count: ranks on other machines cannot connect to the local "
            r"servers of rank 0: use engine\.servers\.urls",
        ):
            start_pool(tiny(), tmp_path)
    with pytest.raises(UserError, match="tensor_parallel=3 does not divide the model's 2 "):
        start_pool(tiny(), tmp_path, tensor_parallel=3)
    monkeypatch.delenv("GRPO_ENGINE_TOKEN", raising=False)
    with pytest.raises(UserError, match="GRPO_ENGINE_TOKEN is not set"):
        start_pool(tiny(), tmp_path, count=0, urls=["http://127.0.0.1:9"])
    tree = tiny_config(tmp_path, tiny()).model_dump(mode="json", exclude={"engine"})
    for servers, message in (
        ({}, "set count"),
        ({"urls": ["http://x"], "transfer": "memory"}, "reaches servers on this machine only"),
    ):
        with pytest.raises(UserError, match=message):
            configs.parse({**tree, "engine": {"servers": servers}})


def test_max_staleness_requires_servers(tiny, tmp_path):
    with pytest.raises(UserError, match="max_staleness needs servers"):
        tiny_config(tmp_path, tiny(), train={"rollouts": 1, "max_staleness": 1})
