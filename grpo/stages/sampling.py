"""Sampling and scoring of the stages that do not learn: a `Sampler`, and the reward functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grpo.config import SampledConfig, Teacher
from grpo.experience import plugins
from grpo.experience.prompts import Chat, Prompts
from grpo.experience.sampling import make_group_requests, sample, sampling_options, seed_of
from grpo.learning import models
from grpo.run.display import quiet
from grpo.stages.engine import EngineModel, send_weights, start_engine
from grpo.stages.run_context import RunContext
from grpo.stages.start_model import find_model
from grpo.types import Group, Problem
from rewards.workers.pool import Pool

Rewards = dict[str, tuple[plugins.RewardFunction, float]]  # function and weight, by name


def load_rewards(config: SampledConfig) -> tuple[Pool, Rewards]:
    """Returns a pool of reward workers, which the caller closes, and the rewards that use it.

    Raises UserError if a reward is unknown or its options are wrong.
    """
    pool = Pool(config.reward_pool.workers, memory_gb=config.reward_pool.memory_gb)
    return pool, plugins.rewards(config.rewards, pool)


def check_rewards(config: SampledConfig) -> None:
    """Raises UserError if a reward is unknown or its options are wrong. Starts no worker."""
    plugins.rewards(config.rewards, Pool())


class Sampler:
    """Samples from the model of a config on an engine, or from a model behind an endpoint."""

    def __init__(
        self, config: SampledConfig, context: RunContext, endpoint: Teacher | None
    ) -> None:
        """Connects to `endpoint`, or starts the engine of `config.model` if it is None."""
        self._config = config
        self._endpoint: Any = None
        self.engine: Any = None
        self.prompts: Prompts | Chat
        if endpoint:
            from grpo.engines.endpoint import Endpoint

            self._endpoint = Endpoint(endpoint, on_wait=context.signals.check)
            self.prompts = Chat(config.prompt)
            return
        model_dir, _, self.prompts = find_model(config, context.run)
        models.check_context(model_dir, config.max_sequence_tokens)
        model = EngineModel(
            model_dir=model_dir, num_weights=models.num_weights(model_dir), load_weights=True
        )
        self.engine = start_engine(config, context, model)
        if config.engine.servers and config.engine.servers.urls:
            # Servers that run already have random weights, or those of another run.
            with quiet(context.run.log_file("learner")):
                send_weights(self.engine, model_dir)

    def sample(
        self,
        problems: Sequence[Problem],
        count: int,
        temperature: float,
        on_progress: Callable[[int, int], None],
    ) -> list[Group]:
        """Returns `count` completions of each problem.

        Their seeds depend on the run's seed and the problem only.
        """
        options = sampling_options(self._config, self.prompts, temperature)
        run_seed = self._config.seed
        if isinstance(self.prompts, Prompts):
            group_requests = make_group_requests(
                self.prompts, problems, group_size=count, run_seed=run_seed, rollout=0
            )
            return sample(self.engine, self.prompts, group_requests, options, on_progress)
        requests = [
            (self.prompts.messages(problem), seed_of(run_seed, 0, problem.id), count)
            for problem in problems
        ]
        completions = self._endpoint.generate(requests, options, on_progress)
        return [
            Group(problem=problem, prompt_ids=(), completions=row)
            for problem, row in zip(problems, completions, strict=True)
        ]
