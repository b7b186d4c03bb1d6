"""Pools of real servers: killed servers, frozen servers, remote servers and complete runs."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from server_pools import OPTIONS, REQUESTS, model_weights, pool_run_config, start_pool
from whole_runs import read_metrics, run_grpo, start_grpo, wait_for, write_config

from grpo.engines import EngineError
from grpo.engines.servers import pool as pool_module
from grpo.engines.servers import supervisor
from grpo.engines.servers.guard import TOKEN_VARIABLE
from grpo.run.addresses import free_port

pytestmark = [pytest.mark.engine, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def wait_until_all_up(pool):
    wait_for(lambda: all(server.up for server in pool._state.servers), seconds=90)


def wait_until_up(server):
    wait_for(lambda: server.up, seconds=90)


def token_ids(groups):
    """Returns the token ids of each completion of each group."""
    result = []
    for group in groups:
        result.append([completion.token_ids for completion in group])
    return result


def max_probe_gap(run_dir):
    return max(row["probe/gap"] for row in read_metrics(run_dir))


def test_flipped_bit_is_reported_and_the_servers_load_the_next_weights(pool, tiny, monkeypatch):
    write = pool._sender.write

    def write_and_flip_bit(stream):
        update_info = write(stream)
        stored_bytes = pool._sender._mapped.mapping
        stored_bytes[stored_bytes.numel() // 2] ^= 4
        return update_info

    monkeypatch.setattr(pool._sender, "write", write_and_flip_bit)
    with pytest.raises(EngineError, match=r"the bytes of \S+ differ from those that were sent"):
        pool.load_weights(model_weights(tiny()), 4)
    monkeypatch.undo()
    # No server is up at this time. Each server loads these weights when it has recovered.
    pool.load_weights(model_weights(tiny()), 5)
    wait_until_all_up(pool)
    assert len(pool.generate_on_every_copy(REQUESTS[:4], OPTIONS)) == 2


def test_completions_do_not_change_if_a_server_is_killed_during_a_rollout(
    pool, tiny, pool_messages
):
    pool.load_weights(model_weights(tiny()), 5)
    expected = token_ids(pool.generate(REQUESTS, OPTIONS))
    pool.generate_on_every_copy(REQUESTS[:4], OPTIONS)
    num_earlier_messages = len(pool_messages)
    victim = pool._state.servers[0]
    victim_process = psutil.Process(victim.process.pid)
    engine_processes = victim_process.children(recursive=True)  # the engine core and its worker
    future = pool._loop.submit(pool._generate(REQUESTS, OPTIONS, None))
    wait_for(lambda: victim.load, seconds=90)
    victim_process.kill()
    assert token_ids(future.result(60)) == expected
    assert pool.counts["retried"] > 0
    _, alive = psutil.wait_procs(engine_processes, timeout=10)
    assert not alive
    wait_until_up(victim)
    assert "killed by SIGKILL" in pool_messages[num_earlier_messages]
    assert "is back with weights 5" in pool_messages[-1]
    assert token_ids(pool.generate(REQUESTS, OPTIONS)) == expected


def test_frozen_server_is_restarted(pool, pool_messages, monkeypatch):
    monkeypatch.setattr(supervisor, "HEALTH_TIMEOUT_S", 4.0)
    victim = pool._state.servers[1]
    os.killpg(victim.process.pid, signal.SIGSTOP)
    assert len(pool.generate(REQUESTS, OPTIONS)) == len(REQUESTS)
    wait_until_up(victim)
    assert any("no response for 4 s" in message for message in pool_messages)


def test_server_killed_during_a_sync_loads_the_weights_when_it_recovers(
    pool, tiny, pool_messages, monkeypatch
):
    victim = pool._state.servers[0]
    load_stored = pool._updates.load_stored

    async def kill_victim_and_load(server, version, update_info):
        if server is victim and server.version >= 0:
            server.process.kill()
        await load_stored(server, version, update_info)

    monkeypatch.setattr(pool._updates, "load_stored", kill_victim_and_load)
    pool.load_weights(model_weights(tiny(), 0.9), 6)
    assert len(pool.generate_on_every_copy(REQUESTS[:4], OPTIONS)) == 1
    wait_until_up(victim)
    first, second = pool.generate_on_every_copy(REQUESTS[:4], OPTIONS)
    assert supervisor.mean_logprob_gap(first, second) < 1e-4
    assert any("weights 6 did not reach" in message for message in pool_messages)


def test_server_starts_on_another_port_if_its_port_is_taken_and_loads_weights_from_files(
    tiny, tmp_path, monkeypatch
):
    folder = tmp_path / "weights"
    with socket.socket() as other_socket:
        other_socket.bind(("127.0.0.1", 0))
        other_socket.listen()
        taken_port = other_socket.getsockname()[1]
        monkeypatch.setattr(pool_module, "free_port", lambda: taken_port)
        pool = start_pool(tiny(), tmp_path, count=1, transfer="file", folder=str(folder))
        try:
            urls = pool.wait_ready()["servers"]
            assert urls == [pool._state.servers[0].url]
            assert urls != [f"http://127.0.0.1:{taken_port}"]
            pool.load_weights(model_weights(tiny()), 1)
            (before,) = pool.generate_on_every_copy(REQUESTS[:4], OPTIONS)
            pool.load_weights(model_weights(tiny(), 0.7), 2)
            (after,) = pool.generate_on_every_copy(REQUESTS[:4], OPTIONS)
            first_completion = after[0][0]
            first_version, _, _ = first_completion.versions[0]
            assert first_version == 2
            assert supervisor.mean_logprob_gap(before, after) > 1e-4
            assert len(list(folder.glob("*/*.safetensors"))) == 1
        finally:
            pool.close()
        assert not list(folder.glob("*/*.safetensors"))


def suspend_engine_core(server):
    """Suspends the engine core of a server. Its HTTP server still reports that it is healthy."""
    engine_cores = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        if "EngineCore" in process.name():
            engine_cores.append(process)
    (engine_core,) = engine_cores
    engine_core.suspend()


def test_server_with_a_frozen_engine_core_is_restarted_after_a_sync_timeout_or_a_stall(
    pool, tiny, pool_messages, monkeypatch
):
    pool.load_weights(model_weights(tiny()), 20)
    pool.generate_on_every_copy(REQUESTS[:4], OPTIONS)
    wait_until_all_up(pool)
    victim = pool._state.servers[1]

    suspend_engine_core(victim)
    with monkeypatch.context() as patch:
        patch.setattr(pool._updates, "sync_timeout_s", 10.0)
        start_time = time.monotonic()
        pool.load_weights(model_weights(tiny(), 0.7), 21)
        assert time.monotonic() - start_time < 25
        assert pool._state.servers[0].version == 21
    assert any("did not load weights 21 within 10 s" in message for message in pool_messages)
    wait_until_up(victim)
    first, second = pool.generate_on_every_copy(REQUESTS[:4], OPTIONS)
    assert supervisor.mean_logprob_gap(first, second) < 1e-4

    suspend_engine_core(victim)
    short_stall = pool._supervisor._servers.model_copy(update={"stall_s": 10.0})
    with monkeypatch.context() as patch:
        patch.setattr(pool._supervisor, "_servers", short_stall)
        # Only the other server returns completions.
        (completions,) = pool.generate_on_every_copy(REQUESTS[:4], OPTIONS)
    assert any("no token generated for 10 s" in message for message in pool_messages)
    assert supervisor.mean_logprob_gap(first, completions) < 1e-4


def test_run_on_a_pool_passes_the_probe_and_continues_after_a_server_is_killed(tiny, tmp_path):
    run_dir = tmp_path / "run"
    config = write_config(
        tmp_path / "config.yaml",
        pool_run_config(
            run_dir,
            tiny(),
            eval={"every": 0},
            checkpoint={"every": 0},
            train={"rollouts": 20, "problems": 8, "group_size": 4},
        ),
    )
    process = start_grpo(config, "logging.progress=line")
    wait_for(
        lambda: (run_dir / "metrics.jsonl").exists() and len(read_metrics(run_dir)) >= 3,
        process,
    )
    servers = []
    for child in psutil.Process(process.pid).children():
        if "api_server" in " ".join(child.cmdline()):
            servers.append(child)
    assert len(servers) == 2
    servers[0].kill()
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert read_metrics(run_dir)[-1]["engine/lost"] == 1
    assert max_probe_gap(run_dir) < 1e-4
    assert "killed by SIGKILL" in errors
    assert [row["rollout"] for row in read_metrics(run_dir)] == list(range(21))


def command_lines():
    """Returns the command lines of all processes of this machine."""
    result = []
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        result.append(" ".join(arguments))
    return result


def test_server_with_two_tensor_parallel_workers_loads_the_weights(tiny, tmp_path):
    run_dir = tmp_path / "run"
    engine = {"servers": {"count": 1, "tensor_parallel": 2}, "timeout_s": 100}
    run_grpo(
        write_config(tmp_path / "config.yaml", pool_run_config(run_dir, tiny(), engine=engine))
    )
    assert len(read_metrics(run_dir)) == 5
    assert max_probe_gap(run_dir) < 1e-4
    assert not any(str(run_dir) in command_line for command_line in command_lines())


def evaluated_completions(run_dir):
    lines = (run_dir / "samples" / "eval-000000.jsonl").read_text().splitlines()
    return [json.loads(line)["completion"] for line in lines]


def test_remote_server_trains_and_evaluates_the_weights_that_a_run_sends(
    tiny, tmp_path, monkeypatch
):
    """The server is started with launch/server.sh and reached by its URL.

    The weights are sent through files. An evaluation uses the config's model, not the weights that
    the server holds after the training. A wrong token is a user error.
    """
    run_dir = tmp_path / "run"
    port = free_port()
    engine = {"servers": {"urls": [f"http://127.0.0.1:{port}"]}}
    config = write_config(tmp_path / "config.yaml", pool_run_config(run_dir, tiny(), engine=engine))
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    with (tmp_path / "server.log").open("w") as log:
        command = [str(ROOT / "launch" / "server.sh"), config, str(port), "engine.kv_cache_gb=0.05"]
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        run_grpo(config)
        assert len(read_metrics(run_dir)) == 5
        assert max_probe_gap(run_dir) < 1e-4

        # Both evaluations use the model as it was before the training.
        remote_dir = tmp_path / "remote-eval"
        local_dir = tmp_path / "local-eval"
        run_grpo(config, f"run_dir={remote_dir}", "eval.problems=8", command="eval")
        local_engine = "engine.servers=null"
        run_grpo(config, f"run_dir={local_dir}", "eval.problems=8", local_engine, command="eval")
        assert evaluated_completions(remote_dir) == evaluated_completions(local_dir)

        monkeypatch.setenv(TOKEN_VARIABLE, "guess")
        errors = run_grpo(config, f"run_dir={tmp_path / 'wrong-token'}", code=2)
        assert "rejected the token (401): set GRPO_ENGINE_TOKEN" in errors
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def training_samples(run_dir):
    """Returns the completions of all rollouts in the order of training."""
    samples = []
    for file in sorted((run_dir / "samples").glob("step-*.jsonl")):
        samples += [json.loads(line) for line in file.read_text().splitlines()]
    return samples


def test_asynchronous_run_respects_max_staleness_and_resumes_with_its_queued_groups(tiny, tmp_path):
    run_dir = tmp_path / "run"
    sections = {
        "train": {"rollouts": 12, "problems": 4, "group_size": 4, "max_staleness": 2},
        "checkpoint": {"every": 1, "keep_last": 20},
        "eval": {"every": 0},
        "sampling": {"max_tokens": 40, "ignore_eos": True},
        "engine": {"servers": {"count": 2}, "timeout_s": 100},
        "algorithm": {"mismatch": "tis"},
    }
    config = write_config(tmp_path / "config.yaml", pool_run_config(run_dir, tiny(), **sections))
    process = start_grpo(config)
    wait_for(lambda: (run_dir / "checkpoints" / "step-000004").exists(), process)
    process.kill()
    process.communicate()
    last_checkpoint = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    state = json.loads((last_checkpoint / "state.json").read_text())
    queued_groups = state["selection"]["stream"]["items"]
    assert queued_groups

    run_grpo(config, "--resume", ranks=2)

    rollout_rows = read_metrics(run_dir)[1:]
    assert len(rollout_rows) == 12
    for row in rollout_rows:
        assert 0 < row["mismatch/weight"] <= 2
        assert row["update/made"] == 1
        assert row["staleness/max"] <= 2
        assert 0 <= row["idle/engine"] <= 1
    assert max(row["staleness/max"] for row in rollout_rows) >= 1
    assert {"queue/ready", "queue/in_flight", "histogram/staleness"} <= rollout_rows[0].keys()

    samples = training_samples(run_dir)
    assert len(samples) == 12 * 16  # 12 rollouts of 4 groups of 4 completions
    step = int(last_checkpoint.name.partition("-")[2])
    first_samples = samples[16 * step :: 4]  # the first sample of each group after the checkpoint
    used_problems = [sample["problem"] for sample in first_samples][: len(queued_groups)]
    queued_problems = [group["problem"]["id"] for group in queued_groups]
    problem_order = list(dict.fromkeys(sample["problem"] for sample in samples))
    assert used_problems == queued_problems, problem_order
