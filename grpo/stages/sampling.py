"""Sampling and scoring for the stages without a learner: `Sampler`, and the reward functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grpo.config import EndpointSettings, SamplingStageConfig
from grpo.experience import plugins
from grpo.experience.prompts import ChatPrompts, Prompts
from grpo.experience.sampling import derive_seed, make_group_requests, sample, sampling_options
from grpo.learning import models
from grpo.rewards.workers.pool import WorkerPool
from grpo.run.display import redirect_output
from grpo.stages.engine import EngineModel, send_weights, start_engine
from grpo.stages.run_context import RunContext
from grpo.stages.start_model import find_start_model
from grpo.types import Group, Problem

# (function, weight) by the name of the reward
Rewards = dict[str, tuple[plugins.RewardFunction, float]]


def load_rewards(config: SamplingStageConfig) -> tuple[WorkerPool, Rewards]:
    """Returns a pool of reward workers and the rewards that use it. The caller closes the pool.

    Raises:
        UserError: A reward does not exist, or its options are wrong.
    """
    pool = WorkerPool(config.reward_pool.workers, memory_gb=config.reward_pool.memory_gb)
    return pool, plugins.rewards(config.rewards, pool)


def check_rewards(config: SamplingStageConfig) -> None:
    """Raises UserError if a reward does not exist or its options are wrong. Starts no worker."""
    plugins.rewards(config.rewards, WorkerPool())


class Sampler:
    """Samples completions from an engine with the config's model, or from an endpoint."""

    def __init__(
        self, config: SamplingStageConfig, context: RunContext, endpoint: EndpointSettings | None
    ) -> None:
        """Connects to `endpoint`. If it is None, starts an engine with `config.model`.

        Raises:
            UserError: The model, the prompts or the endpoint is wrong, or the machine has too
                little memory.
        """
        self._config = config
        self._endpoint: Any = None
        self.engine: Any = None
        self.prompts: Prompts | ChatPrompts
        if endpoint is not None:
            from grpo.engines.endpoint import Endpoint

            self._endpoint = Endpoint(endpoint, on_wait=context.signals.raise_if_received)
            self.prompts = ChatPrompts(config.prompt)
            return
        start = find_start_model(config, context)
        self.prompts = start.prompts
        models.check_context(start.model_dir, config.max_sequence_tokens, config.length_keys)
        model = EngineModel(
            model_dir=start.model_dir,
            num_weights=models.num_weights(start.model_dir),
            load_weights=True,
        )
        self.engine = start_engine(config, context, model)
        self.engine.wait_ready()
        if config.engine.servers and config.engine.servers.urls:
            # Servers that were started elsewhere have random weights or those of another run.
            with redirect_output(context.run.log_file("learner")):
                send_weights(self.engine, start.model_dir)

    def sample(
        self,
        problems: Sequence[Problem],
        group_size: int,
        temperature: float,
        on_progress: Callable[[int, int], None],
    ) -> list[Group]:
        """Returns one group of completions per problem, in order.

        The sampling seeds depend only on the run's seed and the problem.

        Args:
            problems: The problems to sample.
            group_size: Completions per problem.
            temperature: Sampling temperature; 0 is greedy.
            on_progress: Called as `on_progress(num_finished, total)` during sampling.

        Returns:
            The groups. Those of an endpoint have no `prompt_ids`, because it does not return them.
        """
        options = sampling_options(self._config, self.prompts, temperature)
        run_seed = self._config.seed
        if isinstance(self.prompts, Prompts):
            group_requests = make_group_requests(
                self.prompts, problems, group_size=group_size, run_seed=run_seed, rollout=0
            )
            return sample(self.engine, self.prompts, group_requests, options, on_progress)
        requests = [
            (self.prompts.messages(problem), derive_seed(run_seed, 0, problem.id), group_size)
            for problem in problems
        ]
        completions = self._endpoint.generate(requests, options, on_progress)
        return [
            Group(problem=problem, prompt_ids=(), completions=completions_of_problem)
            for problem, completions_of_problem in zip(problems, completions, strict=True)
        ]
