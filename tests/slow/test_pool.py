"""Servers that are killed, hang or belong to somebody else, alone and in whole runs."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from server_pools import OPTIONS, REQUESTS, pool_of, pooled, weights
from whole_runs import rows, run, start, wait_for, write_config

from grpo.engines import EngineError
from grpo.engines.servers import pool as pool_module
from grpo.engines.servers import supervisor
from grpo.engines.servers.guard import TOKEN_VARIABLE
from grpo.run.addresses import free_port

pytestmark = [pytest.mark.engine, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def test_a_flipped_bit_on_the_way_is_named_and_the_server_gets_the_weights_again(
    pool, tiny, said, monkeypatch
):
    write = pool._sender.write

    def broken(stream):
        update_info = write(stream)
        sent = pool._sender._mapped.bytes
        sent[sent.numel() // 2] ^= 4
        return update_info

    monkeypatch.setattr(pool._sender, "write", broken)
    with pytest.raises(EngineError, match=r"the bytes of \S+ differ from those that were sent"):
        pool.load_weights(weights(tiny()), 4)
    monkeypatch.undo()
    pool.load_weights(weights(tiny()), 5)  # nobody is there to take them: who comes back gets them
    wait_for(lambda: all(server.up for server in pool._state.servers), seconds=90)
    assert len(pool.prove(REQUESTS[:4], OPTIONS)) == 2


def test_a_server_killed_in_the_middle_of_a_rollout_costs_only_what_it_was_doing(pool, tiny, said):
    pool.load_weights(weights(tiny()), 5)
    expected = pool.generate(REQUESTS, OPTIONS)
    pool.prove(REQUESTS[:4], OPTIONS)
    victim, seen = pool._state.servers[0], len(said)
    family = [
        psutil.Process(victim.process.pid),
        *psutil.Process(victim.process.pid).children(recursive=True),
    ]
    future = pool._loop.submit(pool._generate(REQUESTS, OPTIONS, None))
    wait_for(lambda: victim.load, seconds=90)
    family[0].kill()
    assert [[c.token_ids for c in row] for row in future.result(60)] == [
        [c.token_ids for c in row] for row in expected
    ]
    assert pool.counts["retried"] > 0
    assert not psutil.wait_procs(family[1:], timeout=10)[1]  # its core and worker go with it
    wait_for(lambda: victim.up, seconds=90)
    assert "killed by SIGKILL" in said[seen] and "is back with weights 5" in said[-1]
    assert [[c.token_ids for c in row] for row in pool.generate(REQUESTS, OPTIONS)] == [
        [c.token_ids for c in row] for row in expected
    ]


def test_a_server_that_hangs_is_started_again(pool, said, monkeypatch):
    monkeypatch.setattr(supervisor, "HEALTH_TIMEOUT_S", 4.0)
    victim = pool._state.servers[1]
    os.killpg(victim.process.pid, signal.SIGSTOP)
    assert len(pool.generate(REQUESTS, OPTIONS)) == len(REQUESTS)
    wait_for(lambda: victim.up, seconds=90)
    assert any("no response for 4 s" in text for text in said)


def test_a_server_killed_in_the_middle_of_a_sync_gets_the_weights_when_it_is_back(
    pool, tiny, said, monkeypatch
):
    load_stored = pool._updates.load_stored

    async def killing(server, version, update_info):
        if server is pool._state.servers[0] and server.version >= 0:
            server.process.kill()
        await load_stored(server, version, update_info)

    monkeypatch.setattr(pool._updates, "load_stored", killing)
    pool.load_weights(weights(tiny(), 0.9), 6)
    assert len(pool.prove(REQUESTS[:4], OPTIONS)) == 1
    wait_for(lambda: pool._state.servers[0].up, seconds=90)
    assert supervisor.mean_logprob_gap(*pool.prove(REQUESTS[:4], OPTIONS)) < 1e-4 and any(
        "weights 6 did not reach" in text for text in said
    )


def test_a_port_taken_meanwhile_costs_a_start_and_weights_go_through_files(
    tiny, tmp_path, monkeypatch
):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        monkeypatch.setattr(pool_module, "free_port", lambda: taken)
        pool = pool_of(tiny(), tmp_path, count=1, transfer="file", folder=str(tmp_path / "weights"))
        try:
            assert (
                pool.wait_ready()["servers"]
                == [pool._state.servers[0].url]
                != [f"http://127.0.0.1:{taken}"]
            )
            pool.load_weights(weights(tiny()), 1)
            (before,) = pool.prove(REQUESTS[:4], OPTIONS)
            pool.load_weights(weights(tiny(), 0.7), 2)
            (after,) = pool.prove(REQUESTS[:4], OPTIONS)
            assert after[0][0].versions[0][0] == 2
            assert supervisor.mean_logprob_gap(before, after) > 1e-4
            assert len(list((tmp_path / "weights").glob("*/*.safetensors"))) == 1
        finally:
            pool.close()
        assert not list((tmp_path / "weights").glob("*/*.safetensors"))


def test_a_server_whose_engine_hangs_in_a_sync_is_left_out_of_it_and_started_again(
    pool, tiny, said, monkeypatch
):
    """Its HTTP side still says that it is well."""
    pool.load_weights(weights(tiny()), 20)
    pool.prove(REQUESTS[:4], OPTIONS)
    wait_for(lambda: all(server.up for server in pool._state.servers), seconds=90)
    victim = pool._state.servers[1]
    (core,) = [
        p
        for p in psutil.Process(victim.process.pid).children(recursive=True)
        if "EngineCore" in p.name()
    ]
    core.suspend()
    with monkeypatch.context() as patch:
        patch.setattr(pool._updates, "sync_timeout_s", 10.0)
        start = time.monotonic()
        pool.load_weights(weights(tiny(), 0.7), 21)
        assert time.monotonic() - start < 25 and pool._state.servers[0].version == 21
    assert any("did not load weights 21 within 10 s" in line for line in said)
    wait_for(lambda: victim.up, seconds=90)
    first, second = pool.prove(REQUESTS[:4], OPTIONS)
    assert supervisor.mean_logprob_gap(first, second) < 1e-4
    (core,) = [
        p
        for p in psutil.Process(victim.process.pid).children(recursive=True)
        if "EngineCore" in p.name()
    ]
    core.suspend()
    impatient = pool._supervisor._servers.model_copy(update={"stall_s": 10.0})
    with monkeypatch.context() as patch:
        patch.setattr(pool._supervisor, "_servers", impatient)
        (only,) = pool.prove(REQUESTS[:4], OPTIONS)  # the other one's samples
    assert (
        any("no token generated for 10 s" in line for line in said)
        and supervisor.mean_logprob_gap(first, only) < 1e-4
    )


def test_a_run_on_a_pool_is_proved_and_survives_a_killed_server(tiny, tmp_path):
    config = write_config(
        tmp_path / "config.yaml",
        pooled(
            tmp_path / "run",
            tiny(),
            eval={"every": 0},
            checkpoint={"every": 0},
            train={"rollouts": 20, "problems": 8, "group_size": 4},
        ),
    )
    process = start(config, "logging.progress=line")
    wait_for(
        lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(rows(tmp_path / "run")) >= 3,
        process,
    )
    servers = [
        p for p in psutil.Process(process.pid).children() if "api_server" in " ".join(p.cmdline())
    ]
    assert len(servers) == 2
    servers[0].kill()
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    found = rows(tmp_path / "run")
    assert (
        found[-1]["engine/lost"] == 1
        and max(row["probe/gap"] for row in found) < 1e-4
        and "killed by SIGKILL" in errors
    )
    assert [row["rollout"] for row in found] == list(range(21))


def test_a_server_of_two_workers_that_share_each_layer_gets_its_weights(tiny, tmp_path):
    split = {"servers": {"count": 1, "tensor_parallel": 2}, "timeout_s": 100}
    run(write_config(tmp_path / "config.yaml", pooled(tmp_path / "run", tiny(), engine=split)))
    found = rows(tmp_path / "run")
    assert len(found) == 5 and max(row["probe/gap"] for row in found) < 1e-4
    assert not [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(tmp_path / "run") in " ".join(p.info["cmdline"] or [])
    ]


def test_servers_of_somebody_else_train_and_judge_the_model_that_they_are_sent(
    tiny, tmp_path, monkeypatch
):
    """launch/server.sh, by URL.

    Weights go through files, a wrong token is told, and an evaluation is not of what the server
    holds.
    """
    port = free_port()
    urls = {"servers": {"urls": [f"http://127.0.0.1:{port}"]}}
    config = write_config(tmp_path / "config.yaml", pooled(tmp_path / "run", tiny(), engine=urls))
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    with (tmp_path / "server.log").open("w") as log:
        command = [str(ROOT / "launch" / "server.sh"), config, str(port), "engine.kv_cache_gb=0.05"]
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        run(config)
        assert (
            len(rows(tmp_path / "run")) == 5
            and max(row["probe/gap"] for row in rows(tmp_path / "run")) < 1e-4
        )
        # the model before the training
        run(config, f"run_dir={tmp_path / 'theirs'}", "eval.problems=8", command="eval")
        run(
            config,
            f"run_dir={tmp_path / 'ours'}",
            "eval.problems=8",
            "engine.servers=null",
            command="eval",
        )
        judged = [
            (tmp_path / name / "samples" / "eval-000000.jsonl").read_text().splitlines()
            for name in ("theirs", "ours")
        ]
        assert [json.loads(line)["completion"] for line in judged[0]] == [
            json.loads(line)["completion"] for line in judged[1]
        ]
        monkeypatch.setenv(TOKEN_VARIABLE, "guess")
        assert "rejected the token (401): set GRPO_ENGINE_TOKEN" in run(
            config, f"run_dir={tmp_path / 'wrong'}", code=2
        )
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_asynchronous_rollouts_stay_within_their_staleness_and_resume_loses_no_group(
    tiny, tmp_path
):
    made = {
        "train": {"rollouts": 12, "problems": 4, "group_size": 4, "max_staleness": 2},
        "checkpoint": {"every": 1, "keep_last": 20},
        "eval": {"every": 0},
    }
    made |= {
        "sampling": {"max_tokens": 40, "ignore_eos": True},
        "engine": {"servers": {"count": 2}, "timeout_s": 100},
    }
    made["algorithm"] = {"mismatch": "tis"}
    config = write_config(tmp_path / "config.yaml", pooled(tmp_path / "run", tiny(), **made))
    process = start(config)
    wait_for(lambda: (tmp_path / "run" / "checkpoints" / "step-000004").exists(), process)
    process.kill()
    process.communicate()
    last = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    waiting = json.loads((last / "state.json").read_text())["selection"]["stream"]["items"]
    assert waiting
    run(config, "--resume", ranks=2)
    found = rows(tmp_path / "run")[1:]
    assert all(0 < row["mismatch/weight"] <= 2 and row["update/made"] == 1 for row in found)
    assert (
        len(found) == 12
        and all(row["staleness/max"] <= 2 for row in found)
        and max(row["staleness/max"] for row in found) >= 1
    )
    assert (
        all(0 <= row["idle/engine"] <= 1 for row in found)
        and {"queue/ready", "queue/in_flight", "histogram/staleness"} <= found[0].keys()
    )
    kept = [
        json.loads(line)
        for file in sorted((tmp_path / "run" / "samples").glob("step-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    order = list(dict.fromkeys(row["problem"] for row in kept))
    assert len(kept) == 12 * 16
    step = int(last.name.partition("-")[2])
    used = [row["problem"] for row in kept[16 * step :: 4]][: len(waiting)]
    assert used == [item["problem"]["id"] for item in waiting], order
