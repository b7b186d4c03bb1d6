"""The command line: `grpo COMMAND CONFIG [key=value ...]`.

Exit codes: 0 done, 1 the run failed, 2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import select
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from grpo import __version__
from grpo.types import RunError, UserError

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that `arguments` give (default: sys.argv[1:]) and returns its exit code."""
    try:
        return _main(arguments)
    finally:
        _flush_stdout()


def _main(arguments: list[str] | None) -> int:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    from grpo.run import ranks
    from grpo.run.signals import Interrupted

    try:
        options = _parse(arguments)
        ranks.adopt_srun()
        code: int = options.handler(options)
        return code
    except (UserError, RunError) as error:
        _tell(error)
        return 2 if isinstance(error, UserError) else 1
    except Interrupted as error:
        if not ranks.failed_elsewhere(error):
            print(f"grpo: interrupted by {error}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("grpo: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not _stdout_has_reader():
            return 1
        traceback.print_exc()
        print(f"grpo: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _flush_stdout() -> None:
    """Writes out what was printed.

    If that fails (no reader, a full disk), standard output becomes the null device, so that Python
    does not complain when it exits and the exit code stays that of the command.
    """
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _stdout_has_reader() -> bool:
    """Returns False if standard output is a pipe whose reader has left (`grpo ... | head`)."""
    try:
        stdout = sys.stdout.fileno()
    except io.UnsupportedOperation:  # replaced by an object in memory
        return True
    poll = select.poll()
    poll.register(stdout, 0)
    return all(not event & select.POLLERR for _, event in poll.poll(0))


def _tell(error: Exception) -> None:
    """Prints an error once.

    The rank that has the error prints it. If all ranks of a node have it, the first of them does.

    A launcher ends all ranks as soon as one has ended, so the ranks that do not print wait for that
    end.
    """
    from grpo.run import ranks

    is_reported_elsewhere = ranks.failed_elsewhere(error)
    is_unexpected = isinstance(error, ranks.UnexpectedError | ranks.BrokenExchangeError)
    if is_unexpected and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
    if is_reported_elsewhere or (ranks.local_rank() > 0 and isinstance(error, UserError)):
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(30)
    if not is_reported_elsewhere:
        print(f"grpo: {f'rank {ranks.rank()}: ' if ranks.rank() else ''}{error}", file=sys.stderr)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Returns the options of a command; words may stand before, between and after its flags."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse fills the list at the end of a command once: words after a flag are left over.
    name = options.list_argument
    flags = [word for word in rest if word.startswith("-")]
    if flags or (rest and name is None):
        parser.error(f"unrecognized arguments: {' '.join(flags or rest)}")
    if rest:
        setattr(options, name, [*getattr(options, name), *rest])
    return options


def _parser() -> argparse.ArgumentParser:
    from grpo.stages.registry import SUMMARIES

    parser = argparse.ArgumentParser(
        prog="grpo",
        description="Reinforcement learning of reasoning with GRPO, on vLLM and DeepSpeed.",
    )
    # the deepspeed launcher gives it; LOCAL_RANK is what counts
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in SUMMARIES.items():
        command = _add_config_command(commands, name, summary)
        command.set_defaults(handler=_stage)
        if name == "eval":
            command.set_defaults(handler=_eval)
            command.add_argument(
                "--ask",
                metavar="TEXT",
                help="a problem for the model (run, directory or hub id) given in CONFIG's place",
            )
        _add_dry_run(command)
    _add_doctor(commands)
    _add_bench(commands)
    _add_grade(commands)
    _add_replay(commands)
    _add_report(commands)
    return parser


def _add_config_command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    """Adds a command on a config: its overrides, and how a run is resumed."""
    description = f"{summary[0].upper()}{summary[1:]}."
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description
    )
    command.set_defaults(list_argument="overrides")
    command.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides, e.g. train.rollouts=5 data.path=DIR",
    )
    command.add_argument(
        "--resume", action="store_true", help="go on from the run's last checkpoint"
    )
    command.add_argument(
        "--auto-resume",
        action="store_true",
        help="the same if there is a run, else begin: for jobs that come back",
    )
    return command


def _add_dry_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dry-run", action="store_true", help="check and show everything, start nothing"
    )


def _add_doctor(commands: Any) -> None:
    command = _add_config_command(
        commands, "doctor", "say what will go wrong with a stage's config, before it costs anything"
    )
    command.set_defaults(handler=_doctor)
    command.add_argument("--no-sample", action="store_true", help="start no engine")
    command.add_argument(
        "--gpus", action="store_true", help="only a table: what the run needs of 1 to 64 GPUs"
    )
    command.add_argument(
        "--price", type=float, help="of an hour of the machine, for the cost of the run"
    )
    _add_dry_run(command)


def _add_bench(commands: Any) -> None:
    command = _add_config_command(
        commands, "bench", "measure each phase of a train config against this machine"
    )
    command.set_defaults(handler=_bench)
    command.add_argument(
        "--simulate",
        metavar="DEVICE",
        help="run nothing: reckon 1 to 1,024 of a100, h100, h200, or of a run's machine",
    )
    command.add_argument(
        "--mean", type=float, help="with --simulate: tokens of a completion in the mean"
    )
    _add_dry_run(command)


def _add_grade(commands: Any) -> None:
    command = commands.add_parser(
        "grade", help="verdicts on a file of answers, or on a run's samples by today's rules"
    )
    command.set_defaults(handler=_grade, list_argument=None)
    command.add_argument(
        "path",
        metavar="PATH",
        help="JSONL with prediction or completion, and gold or answer; or a run directory",
    )
    command.add_argument("--explain", type=int, metavar="LINE", help="one line's verdict in detail")
    command.add_argument("--output", metavar="FILE", help="every row with its verdict, as JSONL")


def _add_replay(commands: Any) -> None:
    command = commands.add_parser(
        "replay",
        help="a step's updates once more from what was kept of them, by the same recipe or another",
    )
    command.set_defaults(handler=_replay, list_argument="overrides")
    command.add_argument("run", metavar="RUN", help="run directory")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="another recipe: algorithm.preset=dr_grpo"
    )
    command.add_argument("--step", type=int, help="default: the one after the last checkpoint")


def _add_report(commands: Any) -> None:
    command = commands.add_parser(
        "report",
        help="one HTML file about runs, without network; or follow a running one in the terminal",
    )
    command.set_defaults(handler=_report, list_argument="runs")
    command.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run directories, laid over each other; a pipeline's: its stages",
    )
    command.add_argument("--output", metavar="FILE", help="default: report.html in the first run")
    command.add_argument("--plots", metavar="FOLDER", help="every chart as SVG and PNG too")
    command.add_argument(
        "--follow", action="store_true", help="print a run's steps as they come, until it ends"
    )


def _stage(options: argparse.Namespace) -> int:
    """Runs one of the stages."""
    from grpo import config as configs
    from grpo.stages.registry import find_stage

    stage = find_stage(options.command)
    config: Any = configs.load(options.config, options.overrides, stage.config_class)
    if options.dry_run:
        return _dry_run(stage, config)
    stage.run(config, resume=_resumes(options, config))
    return 0


def _eval(options: argparse.Namespace) -> int:
    """Evaluates a model, compares two evaluations, or asks a model one problem."""
    words = [options.config, *options.overrides]
    if len(words) == 2 and all(Path(word).is_dir() for word in words):
        from grpo.stages.eval import compare

        compare(*words)
        return 0
    if options.ask:
        from grpo.stages.eval import ask

        ask(options.config, options.ask)
        return 0
    return _stage(options)


def _doctor(options: argparse.Namespace) -> int:
    """Inspects a config of any stage; a finding that fails is the user's mistake."""
    from grpo import config as configs
    from grpo.config.reading import apply_overrides, read_yaml
    from grpo.stages.registry import stage_of

    tree = apply_overrides(read_yaml(options.config), options.overrides)
    stage = stage_of(tree)
    config = configs.parse(tree, options.config, stage.config_class)
    if options.dry_run:
        return _dry_run(stage, config)
    from grpo.tools.doctor import doctor

    num_failed = doctor(
        stage, config, sample=not options.no_sample, price=options.price, gpus=options.gpus
    )
    return 2 if num_failed else 0


def _bench(options: argparse.Namespace) -> int:
    """Measures, or simulates, the phases of a train config."""
    from grpo import config as configs
    from grpo.stages.registry import find_stage
    from grpo.stages.run_context import require_one_rank
    from grpo.tools import bench

    require_one_rank("bench")
    config: Any = configs.load(options.config, options.overrides)
    if options.simulate:
        print(bench.simulate(config, options.simulate, options.mean))
        return 0
    if options.dry_run:
        return _dry_run(find_stage("train"), config)
    bench.bench(config, resume=_resumes(options, config))
    return 0


def _grade(options: argparse.Namespace) -> int:
    from grpo.tools.grade import grade

    grade(options.path, explain=options.explain, output=options.output)
    return 0


def _replay(options: argparse.Namespace) -> int:
    """Replays a step; another result by the same recipe is a failure."""
    from grpo.tools.replay import replay

    is_same = replay(options.run, step=options.step, overrides=options.overrides)
    return 0 if is_same or options.overrides else 1


def _report(options: argparse.Namespace) -> int:
    from grpo.tools import report

    if options.follow:
        report.follow(options.runs[0])
    else:
        report.report(options.runs, output=options.output, plots=options.plots)
    return 0


def _dry_run(stage: Any, config: Any) -> int:
    from grpo.tools.dry_run import dry_run

    dry_run(stage, config)
    return 0


def _resumes(options: argparse.Namespace, config: Any) -> bool:
    """Returns whether the run is resumed: as asked, or with --auto-resume if rank 0 sees a run."""
    if not options.auto_resume:
        return bool(options.resume)
    from grpo.run import ranks

    if ranks.world_size() > 1:
        ranks.join(config.longest_wait_s)
    exists = (Path(config.run_dir) / "manifest.json").exists()
    return ranks.all_gather("the run directory", exists)[0]


if __name__ == "__main__":
    sys.exit(main())
