"""Several ranks on one machine, over gloo.

The same updates as one rank, checkpoints for any number, and no rank left waiting.
"""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_config
from training_samples import COMBINATIONS, samples
from whole_runs import environment, run, start, write_config

from grpo.engines import SyncReport
from grpo.learning import models
from grpo.learning.batch import micro_batches, token_weights
from grpo.run import fingerprints, ranks, signals
from grpo.run.addresses import free_port
from grpo.training.weight_sync import sync
from grpo.types import Problem, RunError

pytestmark = pytest.mark.engine
SUPPORT = Path(__file__).parents[2] / "support"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Returns what one rank and what two have come to.

    The second ran, and the first again, beside the other's checkpoints.
    """
    folder, model = tmp_path_factory.mktemp("ranks"), str(tiny())
    for name, launcher in (("one", [sys.executable]), ("two", TORCHRUN), ("one", [sys.executable])):
        (folder / name).mkdir(exist_ok=True)
        command = [*launcher, str(SUPPORT / "ranks_worker.py"), model, str(folder / name)]
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: json.loads((folder / name / "found.json").read_text()) for name in ("one", "two")
    }, folder


@pytest.mark.parametrize(("stage", "dtype"), COMBINATIONS)
def test_two_ranks_make_the_updates_of_one(trained, stage, dtype):
    """In float32 to 1e-5; in bfloat16 gradients are summed in another order, to 8 bits."""
    found, folder = trained
    name, rel = f"{stage}-{dtype}", 1e-5 if dtype == "float32" else 0.02
    for one, two in zip(found["one"][name]["rows"], found["two"][name]["rows"], strict=True):
        assert two == pytest.approx(one, rel=rel, abs=rel)
    first, second = (torch.load(folder / side / f"{name}.pt") for side in ("one", "two"))
    assert all(
        torch.allclose(first[n], second[n], atol=1e-4 if dtype == "float32" else 0.02)
        for n in first
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_that_share_each_sequence_make_the_updates_of_one(trained, stage):
    """Ulysses: attention by heads, all else by slices of the stream.

    The loss is of whole sequences (GSPO).
    """
    found, folder = trained
    for one, two in zip(
        *(found[side][f"shared-{stage}"]["rows"] for side in ("one", "two")), strict=True
    ):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
    first, second = (torch.load(folder / side / f"shared-{stage}.pt") for side in ("one", "two"))
    assert all(torch.allclose(first[n], second[n], atol=1e-4) for n in first)


@pytest.mark.parametrize(("stage", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("side", ["one", "two"])
def test_a_checkpoint_of_another_number_of_ranks_goes_on_as_if_it_were_ours(
    trained, stage, dtype, side
):
    name, rel = f"{stage}-{dtype}", 1e-4 if dtype == "float32" else 0.02
    other = trained[0]["two" if side == "one" else "one"][name]["rows"]
    for then, now in zip(other[-2:], trained[0][side][name]["resumed"], strict=True):
        assert now == pytest.approx(then, rel=rel, abs=rel)


@pytest.mark.parametrize(("stage", "dtype"), COMBINATIONS)
def test_the_canarys_perturbation_reaches_every_weight_and_leaves_none(trained, stage, dtype):
    for side in ("one", "two"):
        found = trained[0][side][f"{stage}-{dtype}"]
        assert found["perturbed"] and found["restored"]


@given(st.integers(1, 12), st.integers(1, 5), st.sampled_from([50, 100, 1000]), st.booleans())
def test_every_sample_is_on_one_rank_and_all_have_as_many_micro_batches(
    count, size, budget, packed
):
    rows = samples(3, count)
    weights = token_weights(rows, "token", 20)
    shares = [
        micro_batches(rows, weights, max_tokens=budget, packed=packed, share=(rank, size))
        for rank in range(size)
    ]
    assert len({len(batches) for batches in shares}) == 1
    own = [batch for batches in shares for batch in batches if not batch.idle]
    assert sorted(i for batch in own for i in batch.index) == list(range(count))
    assert sum(float(batch.token_weights.sum()) for batch in own) == pytest.approx(1, abs=1e-5)
    assert all(
        not batch.token_weights.any() for batches in shares for batch in batches if batch.idle
    )


def on_two_ranks(
    tmp_path: Path, program: str, *arguments: str, timeout_s: float = 60
) -> subprocess.CompletedProcess:
    """Returns what became of a program under torchrun."""
    file = tmp_path / "program.py"
    file.write_text(program)
    return subprocess.run(
        [*TORCHRUN, str(file), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


LOST = """
import sys, time
from grpo.run import ranks
ranks.join(float(sys.argv[1]))
ranks.all_gather("a first greeting", 1)
if ranks.rank() == 1:
    sys.argv[2] == "exit" and sys.exit(3)
    if sys.argv[2] == "raise": ranks.all_gather_or_raise("a hard sum", lambda: 1 / 0)
    time.sleep(60)
ranks.all_gather_or_raise("a hard sum", lambda: 1)
"""


@pytest.mark.parametrize(
    ("how", "told"),
    [("hang", "waited for a hard sum"), ("raise", "ZeroDivisionError: division by zero")],
)
def test_a_rank_that_hangs_or_fails_is_told_by_the_others(tmp_path, how, told):
    started = time.monotonic()
    done = on_two_ranks(tmp_path, LOST, "3", how)
    assert done.returncode == 1 and told in done.stderr
    assert time.monotonic() - started < 45


ENDED = """
import atexit, sys
from pathlib import Path
from grpo.run import ranks
def gloo_threads():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)
def at_exit():  # registered first, so it runs last
    sys.stdout.write(f"rank {ranks.rank()}: {before > 0} {gloo_threads()}\\n")
    sys.stdout.flush()
atexit.register(at_exit)
ranks.join(30)
ranks.all_gather("a greeting", 1)
before = gloo_threads()
"""


def test_no_thread_of_gloo_outlives_the_interpreter(tmp_path):
    # one that frees a tensor then aborts a process that has succeeded
    done = on_two_ranks(tmp_path, ENDED, timeout_s=90)
    assert sorted(done.stdout.splitlines()) == ["rank 0: True 0", "rank 1: True 0"], done.stderr


CROSSED = """
import sys
from grpo.run import ranks
ranks.join(20)
def say(text):  # in one piece: both ranks write to one pipe
    sys.stdout.write(f"rank {ranks.rank()}: {text}\\n")
    sys.stdout.flush()
try:
    ranks.all_gather("the groups" if ranks.rank() == 0 else "the end", f"of rank {ranks.rank()}")
except ranks.ExchangeMismatchError as error:
    say(error)
try:
    ranks.require_equal({"code": "1", "config": f"of rank {ranks.rank()}"})
except Exception as error:
    say(f"{error} {error.known_to_all_ranks}")
try:
    more = {} if ranks.rank() == 0 else {"rewards.format": "1"}
    ranks.require_equal({"code": "1"} | more)
except Exception as error:
    say(f"{error} {error.known_to_all_ranks}")
"""


def test_ranks_that_meet_in_different_exchanges_do_not_get_each_others_values(tmp_path):
    done = on_two_ranks(tmp_path, CROSSED)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert (
            f"rank {rank}: the ranks are in different exchanges: rank 0: 'the groups', exchange "
            "1; rank 1: 'the end', exchange 1" in done.stdout
        )
        assert (
            f"rank {rank}: the ranks do not start from the same config (config: rank 0 of rank 0, "
            "rank 1 of rank 1)" in done.stdout
        )
        # a key that only one rank has is an error on both
        assert f"rank {rank}: the ranks do not start from the same rewards.format" in done.stdout
    assert done.stdout.count("True") == 4


def test_fingerprints_tell_code_tokenizers_and_problems_apart(tiny):
    tokenizer = models.load_tokenizer(tiny())
    before = fingerprints.of_tokenizer(tokenizer)
    assert before == fingerprints.of_tokenizer(models.load_tokenizer(tiny()))
    tokenizer.chat_template = "{{ messages }}"
    assert before != fingerprints.of_tokenizer(tokenizer)
    problems = [Problem(id=str(i), question="?", answer="1", source="t") for i in range(3)]
    assert fingerprints.of_problems(problems) != fingerprints.of_problems(problems[::-1])
    assert len(fingerprints.of_code()) == 16


def test_alone_there_is_nobody_to_wait_for():
    assert ranks.all_gather("nobody", 5) == [5] and ranks.split_across_ranks(
        "nobody", lambda share: [1, 2, 3][share]
    ) == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        ranks.all_gather_or_raise("nobody", lambda: 1 / 0)
    with pytest.raises(RunError, match="as it was"):
        ranks.rank0_first("nobody", lambda: (_ for _ in ()).throw(RunError("as it was")))


def test_the_doctor_tells_what_lies_between_the_ranks(tiny, tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny()))
    process = start(config, command="doctor", ranks=2, stdout=subprocess.PIPE)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (found,) = re.findall(
        r"^ok +interconnect +2 ranks sum 67 MB in ([\d.]+) ms \(([\d.]+) GB/s\), 4 bytes in (\d+) "
        r"us$",
        out,
        re.MULTILINE,
    )
    many, rate, few = map(float, found)
    # of two ranks each sends all bytes once
    assert 1e3 * many > few > 0 and rate * many == pytest.approx(67.1, rel=0.1)


def test_deepspeeds_launcher_is_a_launcher(tiny, tmp_path):
    """It gives --local_rank, and the number of ranks here by another name than torchrun."""
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny()))
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={world}",
        f"--master_port={free_port()}",
    ]
    done = subprocess.run(
        [*launcher, "--module", "grpo", "doctor", config],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "2 ranks sum 67 MB" in done.stdout, done.stderr[-2000:]


def test_a_signal_waits_for_the_end_of_a_sync_of_several_ranks(monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "all_gather", lambda what, value: [value])
    watched = signals.Signals()

    def load_weights(weights, version):
        os.kill(os.getpid(), signal.SIGTERM)
        watched.check()  # as an engine does while it waits
        return SyncReport(version=version, seconds=1.0, num_bytes=0)

    try:
        assert (
            sync(
                SimpleNamespace(load_weights=load_weights),
                SimpleNamespace(weights=lambda: ()),
                3,
                watched,
            ).version
            == 3
        )
        with pytest.raises(signals.Interrupted, match="SIGTERM"):
            watched.check()
    finally:
        watched.restore()


def test_what_runs_in_one_process_says_so(tiny, tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny()))
    assert (
        run(config, command="eval", ranks=2, code=1).count("grpo eval runs in a single process")
        == 1
    )
