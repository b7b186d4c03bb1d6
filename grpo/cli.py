"""The command line: `grpo COMMAND CONFIG [key=value ...]`.

Exit codes: 0 done, 1 the run failed, 2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import time
import traceback
from pathlib import Path

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
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if unknown := [
        argument for argument in rest if argument.startswith("-") or "=" not in argument
    ]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += rest  # those that came after an option
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
    from grpo.run import ranks

    try:
        ranks.adopt_srun()
        return _run(options)
    except (UserError, RunError) as error:
        _tell(error)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("grpo: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        traceback.print_exc()
        print(f"grpo: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _tell(error: Exception) -> None:
    """Prints an error once.

    The rank that has the error prints it. If all ranks of a node have it, the first of them does.

    A launcher ends all ranks as soon as one has ended, so the ranks that do not print wait for that
    end.
    """
    from grpo.run import ranks

    heard = hasattr(error, "heard")
    if heard or (ranks.local_rank() > 0 and isinstance(error, UserError)):
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(30)
    if not heard:
        print(f"grpo: {f'rank {ranks.rank()}: ' if ranks.rank() else ''}{error}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grpo",
        description="Reinforcement learning of reasoning with GRPO, on vLLM and DeepSpeed.",
    )
    # the deepspeed launcher gives it; LOCAL_RANK is what counts
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in {
        "sft": "fine-tune on worked solutions",
        "train": "train by GRPO",
        "collect": "sample completions and keep the right, readable ones as traces",
        "distill": "a teacher's reasoning into a student: by "
        "text, by its distribution, or on-policy",
        "quantize": "write a finished model in int8 and int4, and judge it before and after",
        "eval": "judge a model by a config's prompts and rewards; or "
        "compare two: `grpo eval RUN RUN`; or ask it: --ask",
        "pipeline": "run a chain of stages and judge the model of each",
        "doctor": "say what will go wrong with a stage's config, before it costs anything",
        "bench": "measure each phase of a train config against this machine",
    }.items():
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
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
        if name == "eval":
            command.add_argument(
                "--ask",
                metavar="TEXT",
                help="a problem for the model (run, directory or hub id) given in CONFIG's place",
            )
        if name == "bench":
            command.add_argument(
                "--simulate",
                metavar="DEVICE",
                help="run nothing: reckon 1 to 1,024 of a100, h100, h200, or of a run's machine",
            )
            command.add_argument(
                "--mean", type=float, help="with --simulate: tokens of a completion in the mean"
            )
        if name == "doctor":
            command.add_argument("--no-sample", action="store_true", help="start no engine")
            command.add_argument(
                "--gpus",
                action="store_true",
                help="only a table: what the run needs of 1 to 64 GPUs",
            )
            command.add_argument(
                "--price", type=float, help="of an hour of the machine, for the cost of the run"
            )
        command.add_argument(
            "--dry-run", action="store_true", help="check and show everything, start nothing"
        )
    command = commands.add_parser(
        "grade", help="verdicts on a file of answers, or on a run's samples by today's rules"
    )
    command.add_argument(
        "path",
        metavar="PATH",
        help="JSONL with prediction or completion, and gold or answer; or a run directory",
    )
    command.add_argument("--explain", type=int, metavar="LINE", help="one line's verdict in detail")
    command.add_argument("--output", metavar="FILE", help="every row with its verdict, as JSONL")
    command.set_defaults(overrides=[])
    command = commands.add_parser(
        "replay",
        help="a step's updates once more from what was kept of them, by the same recipe or another",
    )
    command.add_argument("run", metavar="RUN", help="run directory")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="another recipe: algorithm.preset=dr_grpo"
    )
    command.add_argument("--step", type=int, help="default: the one after the last checkpoint")
    command = commands.add_parser(
        "report",
        help="one HTML file about runs, without network; or follow a running one in the terminal",
    )
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
    command.set_defaults(overrides=[])
    return parser


def _run(options: argparse.Namespace) -> int:
    from grpo import config as configs
    from grpo.config import KINDS, command_of
    from grpo.config.source import apply_overrides, read_yaml
    from grpo.run.signals import Interrupted

    if options.command == "grade":
        from grpo.tools.grade import grade

        grade(options.path, explain=options.explain, output=options.output)
        return 0
    if options.command == "replay":
        from grpo.tools.replay import replay

        return (
            0
            if replay(options.run, step=options.step, overrides=options.overrides)
            or options.overrides
            else 1
        )
    if options.command == "report":
        from grpo.tools import report

        if options.follow:
            report.follow(options.runs[0])
        else:
            report.report(options.runs, output=options.output, plots=options.plots)
        return 0
    if (
        options.command == "eval"
        and len(options.overrides) == 1
        and Path(options.config).is_dir()
        and Path(options.overrides[0]).is_dir()
    ):
        from grpo.stages.eval import compare

        compare(options.config, options.overrides[0])
        return 0
    if options.command == "eval" and options.ask:
        from grpo.stages.eval import ask

        ask(options.config, options.ask)
        return 0
    doctored = options.command == "doctor"
    asked = (
        command_of(apply_overrides(read_yaml(options.config), options.overrides))
        if doctored
        else options.command
    )
    config = configs.load(options.config, options.overrides, KINDS[asked])
    if options.command == "doctor" and not options.dry_run:
        from grpo.tools.doctor import doctor

        return (
            2
            if doctor(config, sample=not options.no_sample, price=options.price, gpus=options.gpus)
            else 0
        )
    if options.command == "bench" and options.simulate:
        from grpo.tools.bench import simulate

        print(simulate(config, options.simulate, options.mean))
        return 0
    if options.dry_run:
        from grpo.tools.dry_run import dry_run

        dry_run(config)
        return 0
    if options.command in ("collect", "quantize", "eval", "pipeline"):
        from grpo.stages.run_context import require_one_rank

        require_one_rank(options.command)
    if options.auto_resume:
        from grpo.run import ranks

        if ranks.count() > 1:
            ranks.join(config.longest_wait_s)
        options.resume = ranks.gather(
            "the run directory", (Path(config.run_dir) / "manifest.json").exists()
        )[0]
    package = "grpo.tools" if options.command == "bench" else "grpo.stages"
    stage = importlib.import_module(f"{package}.{options.command}")
    try:
        getattr(stage, options.command)(config, resume=options.resume)
    except Interrupted as error:
        if not hasattr(error, "heard"):
            print(f"grpo: interrupted by {error}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
