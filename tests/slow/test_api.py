"""The Python interface with real engines: several runs and models in one process."""

import gc
import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest
from stage_configs import (
    SEQUENCE_SECTIONS,
    collect_config,
    distill_config,
    final_weights,
    sft_config,
)
from tiny_models import tiny_config
from whole_runs import (
    TORCHRUN,
    process_environment,
    read_metrics,
    read_reproducible_results,
    run_grpo,
    start_grpo,
    write_config,
    write_yaml,
)

import grpo
from grpo.stages.loaded_model import Model

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _default_reaction_to_ctrl_c():
    """A process that a shell starts in the background ignores SIGINT."""
    previous_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous_handler)


def children():
    """Returns the processes that this one has started, without the pool of pytest's own tools."""
    return [child for child in psutil.Process().children() if "grpo" in " ".join(child.cmdline())]


def training(run_dir, model_dir, **sections):
    """Returns the config of a training with evaluations and several updates per rollout."""
    return tiny_config(
        run_dir,
        model_dir,
        train={"rollouts": 3, "updates_per_rollout": 2},
        eval={"every": 1, "problems": 4},
        rewards={"accuracy": 1.0, "digits:share": 1.0},
        **sections,
    )


@pytest.fixture(scope="module")
def cli_run(tiny, tmp_path_factory):
    """The directory of a run of the command line."""
    folder = tmp_path_factory.mktemp("cli")
    run_grpo(write_config(folder / "config.yaml", training(folder / "run", tiny())))
    return folder / "run"


@pytest.fixture(scope="module")
def api_run(tiny, tmp_path_factory):
    """The same run with `grpo.train`."""
    config = training(tmp_path_factory.mktemp("api") / "run", tiny())
    return grpo.train(config.model_dump(mode="json"))


def test_a_run_of_the_interface_equals_that_of_the_command_line(cli_run, api_run):
    assert read_reproducible_results(api_run.path) == read_reproducible_results(cli_run)
    command_line_files = {path.name for path in cli_run.iterdir()}
    assert {path.name for path in api_run.path.iterdir()} == command_line_files
    assert len(api_run.samples()) == 16
    assert len(api_run.samples(held_out=True)) == 4


@pytest.mark.parametrize("error", [grpo.StopRun, ZeroDivisionError])
def test_a_stopped_training_continues_to_the_same_results(error, cli_run, tiny, tmp_path):
    def stop(row):
        if row["step"] == 1:
            raise error

    config = training(tmp_path / "run", tiny())
    if error is grpo.StopRun:
        run = grpo.train(config, callbacks=[stop])
    else:
        with pytest.raises(ZeroDivisionError):
            grpo.train(config, callbacks=[stop])
        run = grpo.Run(tmp_path / "run")
    assert run.metrics[-1]["step"] == 1
    assert run.status.startswith("stopped: ")
    assert [path.name for path in run.path.glob("checkpoints/*")] == ["step-000001"]
    assert children() == []
    grpo.train(config, resume=True)
    assert read_reproducible_results(run.path) == read_reproducible_results(cli_run)


def test_an_interrupted_training_continues_to_the_same_results(cli_run, tiny, tmp_path):
    def interrupt(row):
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    config = training(tmp_path / "run", tiny())
    with pytest.raises(grpo.RunInterruptedError, match=r"interrupted by SIGINT; .* is saved"):
        grpo.train(config, callbacks=[interrupt])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert children() == []
    grpo.train(config, resume=True)
    assert read_reproducible_results(tmp_path / "run") == read_reproducible_results(cli_run)


def test_the_stages_run_one_after_another_in_one_process(tiny, tmp_path):
    """The second SFT has another dtype, which transformers would take from the environment."""
    rows = []
    cold = grpo.sft(
        sft_config(
            tmp_path / "cold", tiny(), model={"dtype": "bfloat16"}, learner={"zero_stage": 1}
        )
    )
    config = training(tmp_path / "train", cold.final)
    trained = grpo.train(config, callbacks=[rows.append])
    assert rows == trained.metrics
    evaluation = grpo.evaluate(config, {"model.path": trained, "run_dir": tmp_path / "eval"})
    assert evaluation.table["all"]["accuracy"] == rows[-1]["eval/accuracy"]
    assert len(evaluation.samples()) == 4
    with grpo.load(trained) as model:
        held_out = trained.samples(held_out=True)
        answers = model.generate([sample["question"] for sample in held_out])
        texts = [completion.text for (completion,) in answers]
        assert texts == [sample["completion"] for sample in held_out]
    assert children() == []
    models = [value for value in gc.get_objects() if type(value).__name__ == "Qwen2ForCausalLM"]
    assert models == []

    second = sft_config(tmp_path / "second", tiny())
    grpo.sft(second)
    expected = second.model_copy(update={"run_dir": str(tmp_path / "expected")})
    run_grpo(write_config(tmp_path / "expected.yaml", expected), command="sft")
    weights = final_weights(tmp_path / "second")
    expected_weights = final_weights(tmp_path / "expected")
    for name in expected_weights:
        assert weights[name].equal(expected_weights[name]), name


def test_a_loaded_model_answers_as_the_command_line_and_reuses_its_engine(api_run):
    with grpo.load(api_run) as model:
        question = api_run.samples()[0]["question"]
        completion = model.ask(question)
        process = start_grpo(
            str(api_run.path), "--ask", question, command="eval", stdout=subprocess.PIPE
        )
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output.strip() == completion.text.strip()
        (engine,) = children()

        sampled = model.generate([question], temperature=1.0, samples=3)
        assert sampled == model.generate([question], temperature=1.0, samples=3)
        assert sampled != model.generate([question], temperature=1.0, samples=3, seed=1)
        assert len({one.text for one in sampled[0]}) > 1
        problem = grpo.Problem(id="7", question=question, answer="", source="mine")
        assert model.generate([problem])[0] == (completion,)
        (short,) = model.generate([question], max_tokens=2)[0]
        assert short.token_ids == completion.token_ids[:2]
        assert short.finish_reason == "length"
        assert children() == [engine]
        check_mistakes(model, question)
    assert not engine.is_running()
    model.close()
    assert repr(model) == f"Model({str(api_run.path)!r}, closed)"
    with pytest.raises(grpo.RunError, match="the model is closed: load it again"):
        model.ask(question)


def check_mistakes(model: Model, question: str) -> None:
    for arguments, message in [
        ((question,), r"expected a list of questions, got a string"),
        (([3],), "a question must be a str or a Problem, got 3"),
        (([question], {"max_tokens": 0}), "max_tokens=0: expected 1 or more"),
        (([question], {"samples": 0}), "samples=0: expected 1 or more"),
        (([question], {"samples": 2}), "samples=2 with temperature=0 would be equal"),
        (([question], {"temperature": -1}), "temperature=-1: expected 0"),
        (([question], {"max_tokens": 60}), r"prompt.max_tokens \+ sampling.max_tokens = 60"),
        ((["1" * 60],), r"the prompt has 61 tokens, .* sampling.max_tokens = 60"),
    ]:
        questions, *options = arguments
        with pytest.raises(grpo.UserError, match=message):
            model.generate(questions, **(options[0] if options else {}))
    assert model.ask("1" * 55).finish_reason in ("stop", "length")  # longer than prompt.max_tokens


def test_a_model_outlives_the_thread_that_loaded_it_and_ends_with_its_last_reference(api_run):
    models = []
    thread = threading.Thread(target=lambda: models.append(grpo.load(api_run)))
    thread.start()
    thread.join()
    assert models[0].ask("1+1=").token_ids
    (engine,) = children()
    models.clear()
    gc.collect()
    assert not engine.is_running()


def test_an_interrupted_call_closes_the_model(api_run):
    model = grpo.load(api_run, {"sampling.max_tokens": 2000, "sampling.ignore_eos": True})
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        model.generate(["1+1="], samples=200, temperature=1.0)
    assert children() == []
    with pytest.raises(grpo.RunError, match="the model is closed"):
        model.ask("1+1=")


EXIT = """
import grpo, psutil, sys
model = grpo.load(sys.argv[1])
print(psutil.Process().children()[0].pid, model.ask("1+1=").finish_reason)
{ending}
"""


@pytest.mark.parametrize(
    "ending", ["", "raise SystemExit(0)", "import os; os.kill(os.getpid(), 9)"]
)
def test_no_engine_outlives_the_interpreter(ending, api_run):
    process = subprocess.run(
        [sys.executable, "-c", EXIT.format(ending=ending), str(api_run.path)],
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    pid, finish_reason = process.stdout.split()
    assert finish_reason in ("stop", "length")
    assert process.stderr == ""
    psutil.wait_procs([psutil.Process(int(pid))] if psutil.pid_exists(int(pid)) else [], timeout=5)
    assert not psutil.pid_exists(int(pid))


RANKS = """
import sys
import grpo

def stop(row):
    if row["step"] == 2:
        raise {error}

config = sys.argv[1]
try:
    run = grpo.sft(config, callbacks=[stop])
    print("status", run.status)
except (KeyError, grpo.RunInterruptedError) as error:
    print("raised", type(error).__name__)
print("status", grpo.sft(config, resume=True).status)
"""


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        ("grpo.StopRun", ["status stopped: StopRun"] * 2),
        ("KeyError", ["raised CallbackError", "raised KeyError"]),  # on ranks 1 and 0
    ],
)
def test_a_callback_on_rank_0_stops_all_ranks(error, lines, tiny, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RANKS.format(error=error))
    config = write_config(tmp_path / "config.yaml", sft_config(tmp_path / "run", tiny()))
    process = subprocess.run(
        [sys.executable, *TORCHRUN, "--nproc-per-node=2", str(script), config],
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert sorted(process.stdout.splitlines()) == sorted([*lines, *["status finished"] * 2])


def test_other_stages_call_callbacks_also_for_the_stages_inside_them(tiny, tmp_path):
    rows = []
    (tmp_path / "collect").mkdir()
    collected = grpo.collect(collect_config(tmp_path / "collect", tiny()), callbacks=[rows.append])
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert "trace/kept" in rows[0]
    assert len(collected.samples(2)) == 8

    config = distill_config(tmp_path, tiny, way="sequence", **SEQUENCE_SECTIONS)
    rows.clear()
    with pytest.raises(grpo.UserError, match="no thoughts"):  # in the texts of a random model
        grpo.distill(config, callbacks=[rows.append])
    assert [row["trace/kept"] > 0 for row in rows] == [True]


def test_stop_run_in_an_evaluation_of_quantize_stops_quantize(tiny, tmp_path):
    def stop(row):
        raise grpo.StopRun

    sections = {"run_dir", "model", "data", "prompt", "sampling", "engine", "rewards"}
    tree = tiny_config(tmp_path / "run", tiny()).model_dump(mode="json", include=sections)
    tree["quantize"] = {"schemes": ["int8"]}
    tree["eval"] = {"problems": 4}
    run = grpo.quantize(tree, callbacks=[stop])
    assert run.status == "stopped: StopRun"
    assert run.table is None
    assert [path.parent.name for path in run.path.glob("eval-*/manifest.json")] == ["eval-parent"]
    run = grpo.quantize(tree, resume=True)
    assert [row["model"] for row in run.table] == ["parent", "int8"]
    assert run.final == run.path / "int8"


def test_a_pipeline_after_a_run_in_the_same_process_is_silent(
    api_run, tiny, tmp_path, capfd, monkeypatch
):
    """Its processes must not inherit the variables of this process's group."""
    monkeypatch.setenv("PYTHONPATH", process_environment()["PYTHONPATH"])  # for digits.py
    train = write_config(tmp_path / "train.yaml", training("x", tiny()))
    sft = write_config(tmp_path / "sft.yaml", sft_config("x", tiny()))
    pipeline = {
        "run_dir": str(tmp_path / "run"),
        "stages": {
            "cold": {"command": "sft", "config": sft},
            "rl": {"command": "train", "config": train, "model": "cold"},
        },
        "eval": {"sums": {"config": train, "start": False, "set": {"eval.problems": 4}}},
    }
    run = grpo.pipeline(write_yaml(tmp_path / "chain.yaml", pipeline))
    assert capfd.readouterr() == ("", "")
    assert [row["stage"] for row in run.table] == ["cold", "rl"]
    assert run.stage == "pipeline"
    assert run.metrics == []
    assert "| cold |" in (run.path / "pipeline.log").read_text()
    assert len(read_metrics(run.path / "rl")) == 4
