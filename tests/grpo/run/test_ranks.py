"""Tests several ranks on one machine, over gloo: they make the same updates as one rank, load
checkpoints of another number of ranks, and report a rank that fails or is in another exchange.
"""

import base64
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_config
from training_samples import STAGES_AND_DTYPES, random_samples
from whole_runs import TORCHRUN, process_environment, run_grpo, start_grpo, write_config

from grpo.engines import SyncReport
from grpo.learning import models
from grpo.learning.batch import micro_batches, token_weights
from grpo.run import fingerprints, ranks, signals
from grpo.run.addresses import free_port
from grpo.training.weight_sync import sync_weights
from grpo.types import Problem, RunError

pytestmark = pytest.mark.engine
SUPPORT = Path(__file__).parents[2] / "support"
TWO_RANKS = [sys.executable, *TORCHRUN, "--nproc-per-node=2"]


@dataclass(frozen=True)
class TrainedModels:
    """The results of ranks_worker.py on one rank and on two ranks.

    In all methods, `num_ranks` is "one" or "two", and `name` identifies one of the models that the
    program trains: "1-float32" (ZeRO stage and dtype) or "shared-1" (the ranks share sequences) or
    "experts-1" (a mixture of experts).
    """

    folder: Path
    results: dict[str, dict[str, Any]]  # the contents of results.json, by "one" and "two"

    def rows(self, num_ranks: str, name: str) -> list[dict[str, float]]:
        """Returns the metrics of each update."""
        return self.results[num_ranks][name]["rows"]

    def weights(self, num_ranks: str, name: str) -> dict[str, torch.Tensor]:
        """Returns the final weights by name."""
        return torch.load(self.folder / num_ranks / f"{name}.pt")

    def assert_equal_on_one_and_two_ranks(
        self, name: str, *, metrics_tolerance: float, weights_tolerance: float
    ) -> None:
        """Asserts that metrics and final weights are the same on one and on two ranks."""
        for one_rank, two_ranks in zip(self.rows("one", name), self.rows("two", name), strict=True):
            assert two_ranks == pytest.approx(
                one_rank, rel=metrics_tolerance, abs=metrics_tolerance
            )
        weights_of_one = self.weights("one", name)
        weights_of_two = self.weights("two", name)
        for weight_name, weight in weights_of_one.items():
            assert torch.allclose(weight, weights_of_two[weight_name], atol=weights_tolerance)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Runs ranks_worker.py on one rank, on two, and on one again, and returns its results.

    The second and the third run also resume from the checkpoints of the other number of ranks.
    """
    folder = tmp_path_factory.mktemp("ranks")
    python = [sys.executable]
    worker = [str(SUPPORT / "ranks_worker.py"), str(tiny()), str(tiny("tiny-qwen3-moe"))]
    for num_ranks, launcher in (("one", python), ("two", TWO_RANKS), ("one", python)):
        (folder / num_ranks).mkdir(exist_ok=True)
        process = subprocess.run(
            [*launcher, *worker, str(folder / num_ranks)],
            env=process_environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr[-3000:]
    results = {}
    for num_ranks in ("one", "two"):
        results[num_ranks] = json.loads((folder / num_ranks / "results.json").read_text())
    return TrainedModels(folder, results)


@pytest.mark.parametrize(("stage", "dtype"), STAGES_AND_DTYPES)
def test_two_ranks_make_the_same_updates_as_one(trained, stage, dtype):
    """In bfloat16, two ranks sum gradients in another order, so the results differ by rounding."""
    is_float32 = dtype == "float32"
    trained.assert_equal_on_one_and_two_ranks(
        f"{stage}-{dtype}",
        metrics_tolerance=1e-5 if is_float32 else 0.02,
        weights_tolerance=1e-4 if is_float32 else 0.02,
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_that_share_each_sequence_make_the_same_updates_as_one(trained, stage):
    """Ulysses: attention is split by heads, everything else by slices of the packed stream.

    The loss is GSPO, whose ratio depends on complete sequences, and so does the off-policy mask.
    """
    dropped = [row["mismatch/off_policy"] for row in trained.rows("one", f"shared-{stage}")]
    assert 0 < max(dropped) < 1
    trained.assert_equal_on_one_and_two_ranks(
        f"shared-{stage}", metrics_tolerance=1e-5, weights_tolerance=1e-4
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_the_balance_loss_of_experts_is_that_of_the_update_on_both_ranks(trained, stage):
    assert len({row["router/balance"] for row in trained.rows("one", f"experts-{stage}")}) == 4
    trained.assert_equal_on_one_and_two_ranks(
        f"experts-{stage}", metrics_tolerance=1e-5, weights_tolerance=1e-4
    )


@pytest.mark.parametrize(("stage", "dtype"), STAGES_AND_DTYPES)
@pytest.mark.parametrize("num_ranks", ["one", "two"])
def test_training_resumes_from_a_checkpoint_of_another_number_of_ranks(
    trained, stage, dtype, num_ranks
):
    name = f"{stage}-{dtype}"
    tolerance = 1e-4 if dtype == "float32" else 0.02
    num_ranks_of_checkpoint = "two" if num_ranks == "one" else "one"
    uninterrupted_rows = trained.rows(num_ranks_of_checkpoint, name)[-2:]
    resumed_rows = trained.results[num_ranks][name]["resumed"]
    for uninterrupted, resumed in zip(uninterrupted_rows, resumed_rows, strict=True):
        assert resumed == pytest.approx(uninterrupted, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(("stage", "dtype"), STAGES_AND_DTYPES)
def test_the_canarys_perturbation_changes_every_weight_and_is_undone(trained, stage, dtype):
    for num_ranks in ("one", "two"):
        result = trained.results[num_ranks][f"{stage}-{dtype}"]
        assert result["perturbed"]
        assert result["restored"]


@given(st.integers(1, 12), st.integers(1, 5), st.sampled_from([50, 100, 1000]), st.booleans())
def test_every_sample_is_on_one_rank_and_all_ranks_have_the_same_number_of_micro_batches(
    num_samples, num_ranks, max_tokens, packed
):
    rows = random_samples(3, num_samples)
    weights = token_weights(rows, "token", 20)
    batches_of_ranks = [
        micro_batches(rows, weights, max_tokens=max_tokens, packed=packed, share=(rank, num_ranks))
        for rank in range(num_ranks)
    ]
    assert len({len(batches) for batches in batches_of_ranks}) == 1
    indices = []
    total_weight = 0.0
    for batch in itertools.chain.from_iterable(batches_of_ranks):
        if batch.is_filler:
            assert not batch.token_weights.any()
        else:
            indices += batch.sample_indices
            total_weight += float(batch.token_weights.sum())
    assert sorted(indices) == list(range(num_samples))
    assert total_weight == pytest.approx(1, abs=1e-5)


def run_on_two_ranks(
    tmp_path: Path, program: str, *arguments: str, timeout_s: float = 60
) -> subprocess.CompletedProcess:
    """Runs the text of a program under torchrun on two ranks and returns the ended process."""
    file = tmp_path / "program.py"
    file.write_text(program)
    return subprocess.run(
        [*TWO_RANKS, str(file), *arguments],
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


FAILING_RANK = """
import sys
import time

from grpo.run import ranks

failure = sys.argv[1]
ranks.join_process_group(3)
ranks.all_gather("the first exchange", 1)
if ranks.rank() == 1:
    if failure == "raise":
        ranks.all_gather_or_raise("the division", lambda: 1 / 0)
    time.sleep(60)
ranks.all_gather_or_raise("the division", lambda: 1)
"""


@pytest.mark.parametrize(
    ("failure", "message"),
    [("hang", "waited for the division"), ("raise", "ZeroDivisionError: division by zero")],
)
def test_a_rank_that_hangs_or_fails_ends_the_job_with_an_error(tmp_path, failure, message):
    started_at = time.monotonic()
    process = run_on_two_ranks(tmp_path, FAILING_RANK, failure)
    assert process.returncode == 1
    assert message in process.stderr
    assert time.monotonic() - started_at < 45


GLOO_THREADS = """
import atexit
import sys
from pathlib import Path

from grpo.run import ranks


def count_gloo_threads():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)


def print_threads_at_exit():
    has_had_threads = num_threads > 0
    sys.stdout.write(f"rank {ranks.rank()}: {has_had_threads} {count_gloo_threads()}\\n")
    sys.stdout.flush()


atexit.register(print_threads_at_exit)  # registered first, so it is called last
ranks.join_process_group(30)
ranks.all_gather("an exchange", 1)
num_threads = count_gloo_threads()
"""


def test_the_threads_of_gloo_end_before_the_interpreter(tmp_path):
    """A thread that frees a tensor after the end of the interpreter aborts the process."""
    process = run_on_two_ranks(tmp_path, GLOO_THREADS, timeout_s=90)
    lines = sorted(process.stdout.splitlines())
    assert lines == ["rank 0: True 0", "rank 1: True 0"], process.stderr


DIFFERENT_RANKS = """
import sys

from grpo.run import ranks
from grpo.types import UserError


def write_line(text):  # with a single call, because both ranks write to the same pipe
    sys.stdout.write(f"rank {ranks.rank()}: {text}\\n")
    sys.stdout.flush()


def require_equal(fingerprints):
    try:
        ranks.require_equal(fingerprints)
    except UserError as error:
        write_line(f"{error} raised_on_all_ranks={error.raised_on_all_ranks}")


ranks.join_process_group(20)
exchange = "the groups" if ranks.rank() == 0 else "the end"
try:
    ranks.all_gather(exchange, f"value of rank {ranks.rank()}")
except ranks.CollectiveMismatchError as error:
    write_line(error)
require_equal({"code": "1", "config": f"hash-{ranks.rank()}"})
if ranks.rank() == 0:
    require_equal({"code": "1"})
else:
    require_equal({"code": "1", "rewards.format": "1"})
"""


def test_all_ranks_raise_if_their_exchanges_or_fingerprints_differ(tmp_path):
    process = run_on_two_ranks(tmp_path, DIFFERENT_RANKS)
    assert process.returncode == 0, process.stderr
    for rank in (0, 1):
        assert (
            f"rank {rank}: the ranks are in different exchanges: rank 0: 'the groups', exchange "
            "1; rank 1: 'the end', exchange 1" in process.stdout
        )
        assert (
            f"rank {rank}: the ranks do not start from the same config (config: rank 0 hash-0, "
            "rank 1 hash-1)" in process.stdout
        )
        # Both ranks raise for a key that only one of them has.
        assert f"rank {rank}: the ranks do not start from the same rewards.format" in process.stdout
    assert process.stdout.count("raised_on_all_ranks=True") == 4


def test_fingerprints_of_different_tokenizers_and_problems_differ(tiny):
    tokenizer = models.load_tokenizer(tiny())
    fingerprint = fingerprints.fingerprint_tokenizer(tokenizer)
    assert fingerprint == fingerprints.fingerprint_tokenizer(models.load_tokenizer(tiny()))
    tokenizer.chat_template = "{{ messages }}"
    assert fingerprint != fingerprints.fingerprint_tokenizer(tokenizer)
    problems = [Problem(id=str(i), question="?", answer="1", source="t") for i in range(3)]
    assert fingerprints.fingerprint_problems(problems) != fingerprints.fingerprint_problems(
        problems[::-1]
    )
    assert len(fingerprints.fingerprint_code()) == 16


def test_a_single_process_runs_exchanges_without_a_process_group():
    def divide_by_zero():
        return 1 / 0

    def raise_run_error():
        raise RunError("the error of the work")

    assert ranks.all_gather("an exchange", 5) == [5]
    assert ranks.split_across_ranks("an exchange", lambda share: [1, 2, 3][share]) == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        ranks.all_gather_or_raise("an exchange", divide_by_zero)
    with pytest.raises(RunError, match="the error of the work"):
        ranks.rank0_first("an exchange", raise_run_error)


def test_the_doctor_measures_the_interconnect_of_the_ranks(tiny, tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny()))
    process = start_grpo(config, command="doctor", ranks=2, stdout=subprocess.PIPE)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (measured,) = re.findall(
        r"^ok +interconnect +2 ranks all-reduce 67 MB in ([\d.]+) ms \(([\d.]+) GB/s\), "
        r"4 bytes in (\d+) us$",
        output,
        re.MULTILINE,
    )
    duration_ms, bandwidth, latency_us = map(float, measured)
    assert 1000 * duration_ms > latency_us > 0
    # In an all-reduce of two ranks, each rank sends all bytes once. GB/s x ms = MB.
    assert bandwidth * duration_ms == pytest.approx(67.1, rel=0.1)


def test_deepspeeds_launcher_can_start_the_ranks(tiny, tmp_path):
    """It passes --local_rank, and sets LOCAL_SIZE where torchrun sets LOCAL_WORLD_SIZE."""
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny()))
    gpus_by_host = json.dumps({"localhost": [0, 1]})
    world_info = base64.urlsafe_b64encode(gpus_by_host.encode()).decode()
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={world_info}",
        f"--master_port={free_port()}",
    ]
    process = subprocess.run(
        [*launcher, "--module", "grpo", "doctor", config],
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert "2 ranks all-reduce 67 MB" in process.stdout, process.stderr[-2000:]


def test_a_signal_does_not_interrupt_the_sync_of_several_ranks(monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "all_gather", lambda name, value: [value])
    signal_handlers = signals.Signals()

    def load_weights(weights, version):
        os.kill(os.getpid(), signal.SIGTERM)
        signal_handlers.raise_if_received()  # as an engine does while it waits
        return SyncReport(version=version, seconds=1.0, num_bytes=0)

    engine = SimpleNamespace(load_weights=load_weights)
    learner = SimpleNamespace(weights=lambda: ())
    try:
        report = sync_weights(engine, learner, 3, signal_handlers)
        assert report.version == 3
        with pytest.raises(signals.RunInterruptedError, match="SIGTERM"):
            signal_handlers.raise_if_received()
    finally:
        signal_handlers.restore_handlers()


def test_a_single_process_command_on_two_ranks_reports_one_error(tiny, tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", tiny()))
    errors = run_grpo(config, command="eval", ranks=2, code=1)
    assert errors.count("grpo eval runs in a single process") == 1
