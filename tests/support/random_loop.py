"""A training loop with a real learner and an engine that samples random tokens."""

import random
from pathlib import Path

from tiny_models import tiny_config

from grpo.engines import SyncReport
from grpo.experience import plugins
from grpo.experience.selection import Selection
from grpo.learning import lora, models
from grpo.learning.learner import Learner
from grpo.metrics import roofline
from grpo.rewards.workers.pool import WorkerPool
from grpo.run.directory import RunDirectory
from grpo.training.journal import Journal
from grpo.training.loop import Loop
from grpo.training.rollouts import Rollouts
from grpo.training.updates import Updater
from grpo.training.weight_sync import ProbeReport
from grpo.types import Completion, Problem

NUM_PROBLEMS = 40
MAX_TOKENS = 8  # completions of this length have the finish reason `length`


class RandomEngine:
    """An engine that samples 2 to 8 random tokens. They depend only on the seed of the request.

    Attributes:
        weights: Copies of the weights of the last sync, by name.
        version: Version of these weights.
    """

    version = -1

    def generate(self, requests, options, on_progress=None):
        """Returns each request's completions; see grpo.engines.Engine."""
        groups = []
        for request in requests:
            groups.append(tuple(self._completion(request.seed + i) for i in range(request.n)))
        return groups

    def generate_on_every_copy(self, requests, options):
        """Returns the completions of the only copy of the model."""
        return [self.generate(requests, options)]

    def _completion(self, seed):
        generator = random.Random(seed)
        length = generator.randrange(2, MAX_TOKENS + 1)
        ids = tuple(generator.randrange(10, 200) for _ in range(length))
        logprobs = tuple(-4 - generator.random() for _ in ids)
        return Completion(
            token_ids=ids,
            logprobs=logprobs,
            text="",
            finish_reason="length" if length == MAX_TOKENS else "stop",
            versions=((self.version, 0, length),),
        )

    def load_weights(self, weights, version):
        """Keeps copies of the weights."""
        self.weights = {name: weight.clone() for name, weight in weights}
        self.version = version
        return SyncReport(version=version, seconds=0.0, num_bytes=0)

    def reset_cache(self): ...
    def sleep(self): ...
    def wake(self): ...


class SilentDisplay:
    """A display that shows nothing."""

    def begin(self, *_): ...
    def phase(self, *_): ...
    def row(self, *_): ...
    def say(self, *_): ...


class TokenPrompts:
    """Prompts of three tokens. The last token is 7 plus the number in the problem's id."""

    stop = ()
    stop_token_ids = ()

    def token_ids(self, problem):
        """Returns the prompt's token ids."""
        return (5, 6, 7 + int(problem.id[1:]))

    def hinted_token_ids(self, problem, hint, max_tokens):
        """Returns the token ids of a teacher's prompt: one more token, with the hint's length."""
        return (*self.token_ids(problem), 10 + min(len(hint), max_tokens))

    def prefill(self, problem):
        """Returns the beginning of every completion: nothing."""
        return ""

    def reward_prompt(self, problem):
        """Returns the prompt's text: nothing."""
        return ""


def first_token_is_even(completion, problem):
    """Returns the reward 1.0 if the completion begins with an even token id, otherwise 0.0."""
    return float(completion.token_ids[0] % 2 == 0)


def take_problems(position, count):
    """Returns `count` training problems, starting at `position`. Ids repeat after `p39`."""
    return [
        Problem(id=f"p{i % NUM_PROBLEMS}", question="", answer="7", source="t")
        for i in range(position, position + count)
    ]


class PassingWeightCheck:
    """A weight check that always finds equal weights."""

    first_gap = None

    def probe(self, *, full_batch):
        """Returns a report without a gap."""
        return ProbeReport(gap=0.0, limit=1.0)

    def canary(self, version, signals):
        """Returns the gap 0."""
        return 0.0


def make_loop(
    tmp_path,
    tiny,
    *,
    resume=False,
    reward=None,
    take=None,
    kind="tiny-qwen2",
    **sections,
):
    """Returns a started training loop.

    Args:
        tmp_path: The run directory.
        tiny: The fixture `tiny`.
        resume: Whether to continue from the last checkpoint in the run directory.
        reward: The only reward, `f(completion, problem) -> float | None`. Its name is "even". The
            default is `first_token_is_even`.
        take: Returns training problems, `f(position, count) -> list[Problem]`. The default is
            `take_problems`.
        kind: Kind of the tiny model, see `models.make_tiny`.
        sections: Config sections, see `tiny_config`. They replace the defaults of this function for
            `train`, `learner` and `rewards`.
    """
    defaults = {
        "train": {"rollouts": 3, "problems": 4, "group_size": 4},
        "learner": {"lr": 1e-3, "zero_stage": 1},
        "rewards": {"accuracy": 1.0},
    }
    config = tiny_config(tmp_path, tiny(kind), **(defaults | sections))
    learner = _make_learner(config, tiny, kind)
    run = RunDirectory(str(tmp_path), resume=resume)
    rollouts = _make_rollouts(config, reward, take)
    journal = Journal(
        record_row=run.append_metrics,
        display=rollouts.display,
        alarm_rules=config.logging.alarms,
    )
    loop = Loop(
        config=config,
        run=run,
        engine=rollouts.engine,
        rollouts=rollouts,
        updater=Updater(config=config, learner=learner),
        weight_check=PassingWeightCheck(),
        journal=journal,
        signals=None,
        display=rollouts.display,
        limits=roofline.Roofline(
            machine=roofline.Machine(flops=1e9, bandwidth=1e9),
            shape=roofline.model_shape(tiny(kind), 100_000, "float32"),
        ),
    )
    if resume:
        learner.load(run.last_checkpoint())
        loop.resume(run.read_checkpoint_state(run.last_checkpoint()))
    else:
        run.update_manifest(stage="train")
    loop.start(fresh=not resume)
    return loop


def _make_rollouts(config, reward, take):
    if reward is None:
        reward = first_token_is_even
    if take is None:
        take = take_problems
    return Rollouts(
        config=config,
        engine=RandomEngine(),
        prompts=TokenPrompts(),
        rewards={"even": (_for_groups(reward), 1.0)},
        selection=Selection(
            algorithm=config.algorithm,
            num_groups=config.train.problems,
            take_problems=take,
            max_undecided=config.max_undecided,
        ),
        workers=WorkerPool(),
        display=SilentDisplay(),
    )


def _make_learner(config, tiny, kind):
    """Returns a learner with the adapters or the reference model that the config asks for."""
    model = models.load_model(tiny(kind), "packed")
    if config.model.lora:
        lora.add_adapters(model, config.model.lora, "tiny", config.seed)
    teacher_dirs = {
        name: tiny(kind, intermediate_size=128) if path == "another" else Path(path)
        for name, path in config.model.all_teachers.items()
    }
    references = lora.load_references(config, tiny(kind), teacher_dirs)
    loss = plugins.find_function("grpo.losses", config.algorithm.loss, "loss", "loss")
    return Learner(model, config, loss, references)


def _for_groups(reward):
    """Returns a reward function of groups that calls `reward` for every completion."""

    def reward_groups(groups, prompts):
        rewards = []
        for group in groups:
            rewards.append([reward(completion, group.problem) for completion in group.completions])
        return rewards

    return reward_groups
