"""Two real vLLM servers.

What they sample, who may ask them, what is done when one is killed, hangs or gets broken weights.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from conftest import Weights, tiny_config
from test_engine import PROMPTS
from whole_runs import rows, run, start, wait_for, write_config

from grpo import config as configs
from grpo import models, ranks
from grpo.engines import EngineError, RefusedError, Request, SamplingOptions, fleet
from grpo.engines import pool as pool_module
from grpo.engines._nccl import NcclSender
from grpo.engines._plugin import TOKEN
from grpo.engines.pool import Pool
from grpo.engines.server import Server, free_port
from grpo.engines.vllm import VllmEngine
from grpo.types import UserError

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[1]
REQUESTS = [Request(prompt_ids=p, seed=100 * i, n=3) for i, p in enumerate(PROMPTS * 3)]
OPTIONS = SamplingOptions(max_tokens=24, ignore_eos=True)


def settings(**servers):
    return configs.Engine(
        kv_cache_gb=0.05,
        max_sequences=32,
        timeout_s=100,
        servers=configs.Servers(**({"count": 2} | servers)),
    )


def weights(model_dir, scale=1.0):
    model = models.load_model(model_dir, "eager")
    return Weights(
        {name: scale * parameter.detach() for name, parameter in model.named_parameters()}
    )


def pool_of(model_dir, run_dir, said=None, **servers):
    tokenizer = models.load_tokenizer(model_dir)
    return Pool(
        model_dir=str(model_dir),
        settings=settings(**servers),
        dtype="float32",
        max_model_len=160,
        run_dir=run_dir,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        say=(said if said is not None else []).append,
    )


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def pool(tiny, tmp_path_factory, said):
    pool = pool_of(tiny(), tmp_path_factory.mktemp("pool"), said)
    pool.wait_ready()
    pool.load_weights(weights(tiny()), 1)
    yield pool
    pool.close()


def test_two_servers_sample_what_one_child_process_samples(pool, tiny, tmp_path):
    engine = VllmEngine(
        model_dir=str(tiny()),
        settings=settings(),
        dtype="float32",
        max_model_len=160,
        log_file=tmp_path / "log",
        load_weights=True,
    )
    expected = engine.generate(REQUESTS, OPTIONS)
    engine.close()
    done = []
    found = pool.generate(REQUESTS, OPTIONS, lambda *progress: done.append(progress))
    made = [pool._run(pool._call(server, "/metrics", method="GET")) for server in pool._servers]
    # both had work
    assert done[-1] == (36, 36) and all(float(fleet.GENERATED.search(text)[1]) > 0 for text in made)
    for ours, theirs in zip(found, expected, strict=True):
        assert [(c.token_ids, c.text, c.finish_reason) for c in ours] == [
            (c.token_ids, c.text, c.finish_reason) for c in theirs
        ]
        assert all(c.versions == ((1, 0, 24),) for c in ours)
        for a, b in zip(ours, theirs, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_every_route_asks_for_the_token_and_pickles_are_not_served(pool):
    url, token = pool._servers[0].url, pool._servers[0].environment[TOKEN]
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
    assert len(after) == 2 and fleet.difference(after[0], after[1]) < 1e-4 < fleet.difference(
        before[0], after[0]
    )
    pool.load_weights(weights(tiny()), 3)
    assert fleet.difference(before[0], pool.prove(REQUESTS[:4], OPTIONS)[1]) < 1e-4


def test_a_flipped_bit_on_the_way_is_named_and_the_server_gets_the_weights_again(
    pool, tiny, said, monkeypatch
):
    write = pool._weights.write

    def broken(sent):
        told = write(sent)
        pool._weights._bytes[pool._weights._bytes.numel() // 2] ^= 4
        return told

    monkeypatch.setattr(pool._weights, "write", broken)
    with pytest.raises(EngineError, match=r"the bytes of \S+ are not those that were sent"):
        pool.load_weights(weights(tiny()), 4)
    monkeypatch.undo()
    pool.load_weights(weights(tiny()), 5)  # nobody is there to take them: who comes back gets them
    wait(lambda: all(server.up for server in pool._servers))
    assert len(pool.prove(REQUESTS[:4], OPTIONS)) == 2


def test_a_server_killed_in_the_middle_of_a_rollout_costs_only_what_it_was_doing(pool, said):
    expected = pool.generate(REQUESTS, OPTIONS)
    pool.prove(REQUESTS[:4], OPTIONS)
    victim, seen = pool._servers[0], len(said)
    family = [
        psutil.Process(victim.process.pid),
        *psutil.Process(victim.process.pid).children(recursive=True),
    ]
    future = pool._submit(pool._generate(REQUESTS, OPTIONS, None))
    wait(lambda: victim.load)
    family[0].kill()
    assert [[c.token_ids for c in row] for row in future.result(60)] == [
        [c.token_ids for c in row] for row in expected
    ]
    assert pool.counts["retried"] > 0
    assert not psutil.wait_procs(family[1:], timeout=10)[1]  # its core and worker go with it
    wait(lambda: victim.up)
    assert "killed by SIGKILL" in said[seen] and "is back with weights 5" in said[-1]
    assert [[c.token_ids for c in row] for row in pool.generate(REQUESTS, OPTIONS)] == [
        [c.token_ids for c in row] for row in expected
    ]


@pytest.mark.slow
def test_a_server_that_hangs_is_started_again(pool, said, monkeypatch):
    monkeypatch.setattr(fleet, "HEALTH_S", 4.0)
    victim = pool._servers[1]
    os.killpg(victim.process.pid, signal.SIGSTOP)
    assert len(pool.generate(REQUESTS, OPTIONS)) == len(REQUESTS)
    wait(lambda: victim.up)
    assert any("no answer for 4 s" in text for text in said)


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_a_sync_gets_the_weights_when_it_is_back(
    pool, tiny, said, monkeypatch
):
    update = pool._update

    async def killing(server, version):
        if server is pool._servers[0] and server.version >= 0:
            server.process.kill()
        await update(server, version)

    monkeypatch.setattr(pool, "_update", killing)
    pool.load_weights(weights(tiny(), 0.9), 6)
    assert len(pool.prove(REQUESTS[:4], OPTIONS)) == 1
    wait(lambda: pool._servers[0].up)
    assert fleet.difference(*pool.prove(REQUESTS[:4], OPTIONS)) < 1e-4 and any(
        "weights 6 did not reach" in text for text in said
    )


@pytest.mark.slow
def test_a_port_taken_meanwhile_costs_a_start_and_weights_go_through_files(
    tiny, tmp_path, monkeypatch
):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken, free = other.getsockname()[1], fleet.free_port
        ports = iter([taken])
        monkeypatch.setattr(fleet, "free_port", lambda: next(ports, None) or free())
        pool = pool_of(tiny(), tmp_path, count=1, transfer="file", folder=str(tmp_path / "weights"))
        try:
            assert (
                pool.wait_ready()["servers"]
                == [pool._servers[0].url]
                != [f"http://127.0.0.1:{taken}"]
            )
            pool.load_weights(weights(tiny()), 1)
            (before,) = pool.prove(REQUESTS[:4], OPTIONS)
            pool.load_weights(weights(tiny(), 0.7), 2)
            (after,) = pool.prove(REQUESTS[:4], OPTIONS)
            assert after[0][0].versions[0][0] == 2 and fleet.difference(before, after) > 1e-4
            assert len(list((tmp_path / "weights").glob("*/*.safetensors"))) == 1
        finally:
            pool.close()
        assert not list((tmp_path / "weights").glob("*/*.safetensors"))


def test_a_server_whose_trainer_was_killed_while_it_started_ends():
    dead = subprocess.Popen(["true"])
    dead.wait()
    program = f"""import os, subprocess; from grpo.engines._plugin import _end_with
print(subprocess.Popen(['sleep', '60']).pid, flush=True); _end_with(os.getppid(), {dead.pid})"""
    server = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    core = int(server.stdout.readline())
    assert server.wait(timeout=60) == -signal.SIGKILL
    wait(
        lambda: (
            not psutil.pid_exists(core) or psutil.Process(core).status() == psutil.STATUS_ZOMBIE
        ),
        seconds=5,
    )


def bare(*loads):
    """A pool of servers that are up, without servers."""
    made = object.__new__(Pool)
    made._servers = [
        Server(url=f"s{i}", up=True, version=1, load=load) for i, load in enumerate(loads)
    ]
    made._leads, made._version, made._watching, made._transfer, made._idle_since, made._idle_s = (
        True,
        1,
        [],
        "memory",
        None,
        0.0,
    )
    made._settings, made._pool = (
        SimpleNamespace(max_sequences=8, start_timeout_s=1.0),
        SimpleNamespace(retries=2),
    )
    made._changed, made._sending, made.counts = asyncio.Condition(), asyncio.Lock(), {"retried": 0}
    return made


def test_a_request_goes_where_the_least_is_to_do_and_waits_where_all_is_full():
    async def drill():
        pool = bare(6, 2)
        # loads are now 8 and 6
        assert [(await pool._free(size)).url for size in (4, 2)] == ["s1", "s0"]
        waiting = asyncio.ensure_future(pool._free(4))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        pool._servers[1].load -= 4
        await pool._notify()
        assert (await asyncio.wait_for(waiting, 5)).url == "s1" and pool._servers[1].load == 6

    asyncio.run(drill())


def test_a_request_that_fails_everywhere_is_asked_again_so_often_and_no_more():
    asked = []

    async def drill():
        pool = bare(0, 0, 0, 0)

        async def ask(server, request, options, version):
            asked.append((server.url, request.seed))
            raise EngineError("broken off")

        pool._ask = ask
        with pytest.raises(
            EngineError,
            match=r"a request failed 3 times \(engine.servers.retries\): the last time, broken off",
        ):
            await pool._sampled(Request(prompt_ids=(1,), seed=7), OPTIONS)
        assert (
            not any(server.load for server in pool._servers)
            and sum(server.up for server in pool._servers) == 1
        )

    asyncio.run(drill())
    assert asked == [("s0", 7), ("s1", 7), ("s2", 7)]


def test_a_request_that_is_refused_costs_no_server_and_is_not_asked_again():
    async def drill():
        pool = bare(0, 0)

        async def ask(server, request, options, version):
            raise RefusedError("400 the prompt is too long")

        pool._ask = ask
        with pytest.raises(RefusedError, match="too long"):
            await pool._sampled(Request(prompt_ids=(1,), seed=7), OPTIONS)
        assert all(server.up and not server.load for server in pool._servers)

    asyncio.run(drill())


def test_what_a_lost_machine_was_asked_is_asked_elsewhere_though_its_connection_stays_open():
    async def drill():
        pool = bare(0, 0)

        async def ask(server, request, options, version):
            if server.url == "s0":
                await asyncio.sleep(1000)
            return server.url

        pool._ask = ask
        asked = asyncio.ensure_future(pool._sampled(Request(prompt_ids=(1,), seed=7), OPTIONS))
        await asyncio.sleep(0.1)
        pool._servers[0].up = False  # the watch over it says so
        assert await asyncio.wait_for(asked, 10) == "s1"

    asyncio.run(drill())


def test_a_rank_that_does_not_watch_the_servers_asks_others_than_the_one_that_failed(monkeypatch):
    monkeypatch.setattr(pool_module, "AVOID_S", 1000)
    asked = []

    async def drill():
        pool = bare(0, 0, 0)
        pool._leads, pool._version = False, -1

        async def ask(server, request, options, version):
            asked.append(server.url)
            if server.url == "s0":
                raise EngineError("nobody there")
            return server.url

        pool._ask = ask
        for _ in range(3):
            assert (
                await asyncio.wait_for(pool._sampled(Request(prompt_ids=(1,), seed=7), OPTIONS), 10)
                == "s1"
            )

    asyncio.run(drill())
    assert asked == ["s0", "s1", "s1", "s1"]


def test_by_nccl_a_full_pool_is_waited_for_and_one_without_weights_is_an_error():
    async def drill():
        pool = bare(8, 8)
        pool._transfer = "nccl"
        waiting = asyncio.ensure_future(pool._free(4))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        for server in pool._servers:
            server.version = -1
        async with pool._sending:  # a sync is under way
            await pool._notify()
            await asyncio.sleep(0.05)
            assert not waiting.done()
        await pool._notify()
        with pytest.raises(EngineError, match="every server was lost"):
            await asyncio.wait_for(waiting, 5)

    asyncio.run(drill())


def test_a_server_that_fails_in_a_transfer_by_nccl_ends_it_though_the_learner_waits():
    class Trainer:
        """vLLM's sending side.

        It hears of the failure when its broadcast is over, which waits for all.
        """

        def __init__(self):
            self.ended = threading.Event()

        def send_weights(self):
            threading.Thread(target=self.tell).start()
            assert self.ended.wait(60)

        def tell(self):
            with contextlib.suppress(EngineError):
                self.client.update_weights({})

        def shutdown(self):
            self.ended.set()

    async def call(server, path, body):
        raise EngineError(f"{path} at {server.url}: broken off")

    async def run_in_loop():
        loop = asyncio.get_running_loop()
        fleet = SimpleNamespace(
            _call=call,
            _submit=lambda work: asyncio.run_coroutine_threadsafe(work, loop),
            _on_wait=lambda: None,
        )
        sender, trainer = NcclSender(fleet, 1), Trainer()
        sender._join = lambda *_: setattr(sender, "_trainer", trainer)
        servers = [Server(url="s0"), Server(url="s1")]
        start = time.monotonic()
        with pytest.raises(
            EngineError, match="weights 3 to 2 servers by NCCL: /update_weights at s0: broken off"
        ):
            await asyncio.to_thread(sender.send, servers, None, version=3, limit_s=50)
        assert time.monotonic() - start < 10 and trainer.ended.is_set() and sender._trainer is None

    asyncio.run(run_in_loop())


@pytest.mark.slow
def test_a_server_whose_engine_hangs_in_a_sync_is_left_out_of_it_and_started_again(
    pool, tiny, said
):
    """Its HTTP side still says that it is well."""
    pool.load_weights(weights(tiny()), 20)
    pool.prove(REQUESTS[:4], OPTIONS)
    wait(lambda: all(server.up for server in pool._servers))
    victim, was = pool._servers[1], pool._pool
    (core,) = [
        p
        for p in psutil.Process(victim.process.pid).children(recursive=True)
        if "EngineCore" in p.name()
    ]
    core.suspend()
    pool._pool = was.model_copy(update={"sync_timeout_s": 10.0})
    try:
        start = time.monotonic()
        pool.load_weights(weights(tiny(), 0.7), 21)
        assert time.monotonic() - start < 25 and pool._servers[0].version == 21
    finally:
        pool._pool = was
    assert any("was not done with weights 21 within 10 s" in line for line in said)
    wait(lambda: victim.up)
    first, second = pool.prove(REQUESTS[:4], OPTIONS)
    assert fleet.difference(first, second) < 1e-4
    (core,) = [
        p
        for p in psutil.Process(victim.process.pid).children(recursive=True)
        if "EngineCore" in p.name()
    ]
    core.suspend()
    pool._pool = was.model_copy(update={"stall_s": 10.0})
    try:
        (only,) = pool.prove(REQUESTS[:4], OPTIONS)  # the other one's samples
    finally:
        pool._pool = was
    assert (
        any("it made no token for 10 s" in line for line in said)
        and fleet.difference(first, only) < 1e-4
    )


def wait(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_what_cannot_be_is_told_before_anything_starts(tiny, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="needs GPUs on both sides"):
        pool_of(tiny(), tmp_path, transfer="nccl")
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "count", lambda: 4)
        patch.setattr(ranks, "local_count", lambda: 2)
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
        ({}, "give count"),
        ({"urls": ["http://x"], "transfer": "memory"}, "reaches this machine only"),
    ):
        with pytest.raises(UserError, match=message):
            configs.parse(
                {"engine": {"servers": servers}}
                | json.loads(
                    json.dumps(tiny_config(tmp_path, tiny()).model_dump(exclude={"engine"}))
                )
            )


def pooled(folder, model, **sections):
    made = {
        "train": {"rollouts": 4, "problems": 4, "group_size": 4},
        "rewards": {"digits:share": 1.0},
        "eval": {"every": 2, "problems": 4},
        "engine": {"servers": {"count": 2}, "timeout_s": 100},
    }
    return tiny_config(folder, model, **(made | sections))


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


@pytest.mark.slow
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
    monkeypatch.setenv(TOKEN, "secret")
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
        monkeypatch.setenv(TOKEN, "guess")
        assert "refuses our token (401): set GRPO_ENGINE_TOKEN" in run(
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


def test_staleness_needs_servers(tiny, tmp_path):
    with pytest.raises(UserError, match="max_staleness needs servers"):
        tiny_config(tmp_path, tiny(), train={"rollouts": 1, "max_staleness": 1})
