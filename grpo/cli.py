"""The command line: `grpo COMMAND CONFIG [key=value ...]`.

Exit codes: 0 success, 1 the run failed, 2 a mistake in the config or the data, 130 interrupted.

This module imports the heavy packages inside functions only, so that `grpo --help` is fast.
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
from pathlib import Path
from typing import Any

from grpo.run.quiet import silence_libraries
from grpo.types import RunError, UserError

MAX_TERMINATION_S = 30  # longest wait of a rank for the launcher to terminate it


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
        arguments: The words after `grpo`. Default: `sys.argv[1:]`.
    """
    try:
        return _run_command(arguments)
    finally:
        _flush_stdout()


def _run_command(arguments: list[str] | None) -> int:
    silence_libraries()
    from grpo.run import ranks
    from grpo.run.signals import RunInterruptedError

    try:
        options = _parse(arguments)
        ranks.adopt_slurm_variables()
        exit_code: int = options.handler(options)
        return exit_code
    except UserError as error:
        _report_error(error)
        return 2
    except RunError as error:
        _report_error(error)
        return 1
    except RunInterruptedError as error:
        if not ranks.failed_on_another_rank(error):
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
    """Flushes standard output.

    If that fails (no reader, full disk), standard output is redirected to the null device. Python
    would otherwise fail to flush it at exit and replace the exit code of the command.
    """
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _stdout_has_reader() -> bool:
    """Returns False if standard output is a pipe without a reader, as in `grpo ... | head`."""
    try:
        stdout = sys.stdout.fileno()
    except io.UnsupportedOperation:  # standard output is an object in memory
        return True
    poll = select.poll()
    poll.register(stdout, 0)
    return all(not event & select.POLLERR for _, event in poll.poll(0))


def _report_error(error: Exception) -> None:
    """Prints an error once per job, or once per node if all ranks raise it.

    The rank on which the error occurred prints it. A launcher terminates all ranks as soon as one
    has exited, so the other ranks wait to be terminated, and the message is printed first.
    """
    from grpo.run import ranks

    is_unexpected = isinstance(error, ranks.UnexpectedError | ranks.BrokenCollectiveError)
    if is_unexpected and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
    is_reported_elsewhere = ranks.failed_on_another_rank(error)
    # A mistake in the config or the data usually raises on all ranks. Local rank 0 prints it; the
    # others print it only if the launcher does not terminate them first.
    is_repeated = ranks.local_rank() > 0 and isinstance(error, UserError)
    if is_reported_elsewhere or is_repeated:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(MAX_TERMINATION_S)
    if not is_reported_elsewhere:
        prefix = f"rank {ranks.rank()}: " if ranks.rank() else ""
        print(f"grpo: {prefix}{error}", file=sys.stderr)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Returns the options of a command.

    Overrides and runs may be placed before, between and after flags. argparse fills a list argument
    only once, so the words after a flag are appended here.
    """
    parser = _parser()
    options, extra_words = parser.parse_known_args(arguments)
    list_name = options.list_argument
    flags = [word for word in extra_words if word.startswith("-")]
    if flags or (extra_words and list_name is None):
        parser.error(f"unrecognized arguments: {' '.join(flags or extra_words)}")
    if extra_words:
        words = [*getattr(options, list_name), *extra_words]
        setattr(options, list_name, words)
    return options


def _parser() -> argparse.ArgumentParser:
    from grpo.stages.registry import SUMMARIES

    parser = argparse.ArgumentParser(
        prog="grpo",
        description="Trains language models to reason with GRPO, on vLLM and DeepSpeed.",
    )
    # The deepspeed launcher passes it. It is ignored, because LOCAL_RANK has the same value.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--version", action=_PrintVersion)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in SUMMARIES.items():
        command = _add_config_command(commands, name, summary)
        command.set_defaults(handler=_stage)
        if name == "eval":
            command.set_defaults(handler=_eval)
            command.add_argument(
                "--ask",
                metavar="TEXT",
                help="print the model's answer to one problem; CONFIG is then a run, a model "
                "directory or a hub id",
            )
        _add_dry_run(command)
    _add_init(commands)
    _add_doctor(commands)
    _add_bench(commands)
    _add_grade(commands)
    _add_replay(commands)
    _add_report(commands)
    _add_files(commands)
    return parser


class _PrintVersion(argparse.Action):
    """Prints the version. It is read from the installed metadata only if it is asked for."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import grpo

        print(grpo.__version__)
        parser.exit()


def _add_config_command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    """Adds a command that takes a config, overrides and the flags for resuming a run."""
    description = f"{summary[0].upper()}{summary[1:]}."
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description
    )
    command.set_defaults(list_argument="overrides")
    command.add_argument("config", metavar="CONFIG", help="YAML file, e.g. configs/tiny.yaml")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides, e.g. train.rollouts=5 data.path=DIR",
    )
    command.add_argument(
        "--resume", action="store_true", help="continue the run from its last checkpoint"
    )
    command.add_argument(
        "--auto-resume",
        action="store_true",
        help="continue the run if run_dir contains one, else start it: for requeued jobs",
    )
    return command


def _add_dry_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dry-run", action="store_true", help="check the config and print it, start nothing"
    )


def _add_init(commands: Any) -> None:
    command = commands.add_parser(
        "init", help="write a commented config for a model, a data set and this machine"
    )
    command.set_defaults(handler=_init, list_argument="overrides")
    command.add_argument("config", metavar="CONFIG", help="YAML file to write")
    command.add_argument(
        "--model", required=True, help="hub id, local directory or run directory of the model"
    )
    command.add_argument(
        "--data",
        required=True,
        help="name of a data set (gsm8k), a .jsonl, .json, .parquet or .csv file, a folder of such "
        "files, module:function, or owner/name on the hub",
    )
    command.add_argument(
        "--stage", choices=("train", "sft"), default="train", help="default: train"
    )
    command.add_argument(
        "--gpus", type=int, help="number of GPUs of another machine; default: this machine"
    )
    command.add_argument("--gpu-gb", type=float, help="memory of each of its GPUs, in GB")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the config, set as given"
    )


def _add_doctor(commands: Any) -> None:
    command = _add_config_command(
        commands,
        "doctor",
        "check a config before the run: memory, disk, prompts, data, sampled completions",
    )
    command.set_defaults(handler=_doctor)
    command.add_argument("--no-sample", action="store_true", help="do not start an engine")
    command.add_argument(
        "--gpus", action="store_true", help="only print the memory per GPU on 1 to 64 GPUs"
    )
    command.add_argument(
        "--gpu-gb", type=float, default=80, help="memory of a GPU for --gpus, in GB (default: 80)"
    )
    command.add_argument(
        "--price", type=float, help="price of the machine per hour; estimates the cost of the run"
    )
    _add_dry_run(command)


def _add_bench(commands: Any) -> None:
    command = _add_config_command(
        commands,
        "bench",
        "time each phase of a training config and compare it with the limits of this machine",
    )
    command.set_defaults(handler=_bench)
    command.add_argument(
        "--simulate",
        metavar="DEVICE",
        help="run nothing; estimate the step time on 1 to 1,024 GPUs: a100, h100, h200, or a run "
        "directory, whose measured rates are used",
    )
    command.add_argument(
        "--mean", type=float, help="with --simulate: mean completion length in tokens"
    )
    _add_dry_run(command)


def _add_grade(commands: Any) -> None:
    command = commands.add_parser(
        "grade", help="verify the answers in a file, or score the samples of a run again"
    )
    command.set_defaults(handler=_grade, list_argument="overrides")
    command.add_argument(
        "path",
        metavar="PATH",
        help="JSONL with prediction or completion, and gold or answer; or a run directory",
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="with a run: overrides of its config, e.g. 'rewards={my_rewards:brevity: 1.0}'",
    )
    command.add_argument(
        "--explain", type=int, metavar="LINE", help="explain the verdict of one line"
    )
    command.add_argument(
        "--output", metavar="FILE", help="write every row with its verdict as JSONL"
    )


def _add_replay(commands: Any) -> None:
    command = commands.add_parser(
        "replay",
        help="repeat the updates of a step, with the same or another algorithm",
    )
    command.set_defaults(handler=_replay, list_argument="overrides")
    command.add_argument("run", metavar="RUN", help="run directory")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. algorithm.preset=dr_grpo"
    )
    command.add_argument("--step", type=int, help="default: the last step that can be repeated")


def _add_report(commands: Any) -> None:
    command = commands.add_parser(
        "report",
        help="write one HTML file about runs, or follow a running one in the terminal",
    )
    command.set_defaults(handler=_report, list_argument="runs")
    command.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run directories, compared in the same charts; a pipeline stands for all its stages",
    )
    command.add_argument("--output", metavar="FILE", help="default: report.html in the first run")
    command.add_argument("--plots", metavar="FOLDER", help="also write every chart as SVG and PNG")
    command.add_argument(
        "--follow",
        action="store_true",
        help="print the steps of the first run as they appear, until it ends",
    )


def _add_files(commands: Any) -> None:
    command = commands.add_parser(
        "files",
        help="print the folder of the configs and launch scripts that come with grpo, or copy them",
    )
    command.set_defaults(handler=_files, list_argument=None)
    command.add_argument(
        "--copy", metavar="FOLDER", help="copy them to FOLDER/configs and FOLDER/launch"
    )


def _stage(options: argparse.Namespace) -> int:
    """Runs a stage."""
    from grpo import config as configs
    from grpo.stages.registry import find_stage

    stage = find_stage(options.command)
    config: Any = configs.load(options.config, options.overrides, stage.config_class)
    if options.dry_run:
        return _dry_run(stage, config)
    stage.run(config, resume=_should_resume(options, config))
    return 0


def _eval(options: argparse.Namespace) -> int:
    """Evaluates a model, compares two evaluations, or prints a model's answer to one problem."""
    words = [options.config, *options.overrides]
    are_runs = all(Path(word).is_dir() for word in words)
    if len(words) == 2 and are_runs:
        from grpo.stages.eval import compare

        compare(*words)
        return 0
    if options.ask:
        from grpo.stages.eval import ask

        ask(options.config, options.ask)
        return 0
    run = options.config
    if len(words) == 1 and (Path(run) / "config.yaml").is_file():
        raise UserError(
            f"{run} is a run. To evaluate its model: grpo eval {run}/config.yaml model.path={run} "
            f"model.warm_start= run_dir={run.rstrip('/')}-eval. To compare it with another "
            f"evaluation: grpo eval {run} RUN. To ask its model: grpo eval {run} --ask TEXT"
        )
    return _stage(options)


def _init(options: argparse.Namespace) -> int:
    """Writes a config."""
    from grpo.tools.init import InitOptions, init

    init(
        InitOptions(
            path=options.config,
            model=options.model,
            data=options.data,
            stage=options.stage,
            gpus=options.gpus,
            gpu_gb=options.gpu_gb,
            overrides=options.overrides,
        )
    )
    return 0


def _doctor(options: argparse.Namespace) -> int:
    """Checks the config of any stage. Returns 2 if a check fails."""
    from grpo import config as configs
    from grpo.config.reading import apply_overrides, read_yaml
    from grpo.stages.registry import stage_for_config

    tree = apply_overrides(read_yaml(options.config), options.overrides)
    stage = stage_for_config(tree)
    config = configs.parse(tree, options.config, stage.config_class)
    if options.dry_run:
        return _dry_run(stage, config)
    from grpo.tools.doctor import doctor, print_memory_table

    if options.gpus:
        print_memory_table(stage, config, options.gpu_gb)
        return 0
    num_failed = doctor(stage, config, sample=not options.no_sample, price=options.price)
    return 2 if num_failed else 0


def _bench(options: argparse.Namespace) -> int:
    """Measures or simulates the phases of a training config."""
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
    bench.bench(config, resume=_should_resume(options, config))
    return 0


def _grade(options: argparse.Namespace) -> int:
    from grpo.tools.grade import grade

    grade(
        options.path,
        overrides=options.overrides,
        explain=options.explain,
        output=options.output,
    )
    return 0


def _replay(options: argparse.Namespace) -> int:
    """Repeats a step. Returns 1 if the same algorithm produces another result."""
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


def _files(options: argparse.Namespace) -> int:
    from grpo import files

    if options.copy is None:
        print(files.FOLDER)
    else:
        files.copy_files(Path(options.copy).expanduser())
    return 0


def _dry_run(stage: Any, config: Any) -> int:
    from grpo.tools.dry_run import dry_run

    dry_run(stage, config)
    return 0


def _should_resume(options: argparse.Namespace, config: Any) -> bool:
    """Returns whether to resume: with --resume, or with --auto-resume if rank 0 finds a run."""
    if not options.auto_resume:
        return bool(options.resume)
    from grpo.run import ranks

    if ranks.world_size() > 1:
        ranks.join_process_group(config.max_wait_s)
    exists = (Path(config.run_dir) / "manifest.json").exists()
    return ranks.all_gather("the run directory", exists)[0]


if __name__ == "__main__":
    sys.exit(main())
