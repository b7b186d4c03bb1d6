"""Sampling and scoring for the stages without a learner: `Sampler`, and the reward functions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.config import EndpointSettings, EvalConfig, PromptSettings, SamplingStageConfig
from grpo.experience import plugins
from grpo.experience.prompts import ChatPrompts, Prompts
from grpo.experience.sampling import derive_seed, make_group_requests, sample, sampling_options
from grpo.learning import models
from grpo.rewards.workers.pool import WorkerPool
from grpo.run.display import redirect_output
from grpo.stages.engine import EngineModel, send_weights, start_engine
from grpo.stages.run_context import RunContext
from grpo.stages.start_model import find_start_model
from grpo.types import Group, Problem, UserError

# (function, weight) by the name of the reward
Rewards = dict[str, tuple[plugins.RewardFunction, float]]


def load_rewards(config: SamplingStageConfig) -> tuple[WorkerPool, Rewards]:
    """Returns a pool of reward workers and the rewards that use it. The caller closes the pool.

    Raises:
        UserError: A reward does not exist, or its options are wrong.
    """
    pool = WorkerPool(config.reward_pool.workers, memory_gb=config.reward_pool.memory_gb)
    return pool, plugins.rewards(config.rewards, pool)


def load_rewards_of_sets(
    set_configs: Mapping[str, EvalConfig],
) -> tuple[WorkerPool, dict[str, Rewards]]:
    """Returns a pool of reward workers, and the rewards of each evaluation set that use it.

    Args:
        set_configs: The config of each set by name, at least one. The pool is that of the first.

    Raises:
        UserError: A reward does not exist, or its options are wrong.
    """
    settings = next(iter(set_configs.values())).reward_pool
    pool = WorkerPool(settings.workers, memory_gb=settings.memory_gb)
    rewards = {}
    for name, config in set_configs.items():
        try:
            rewards[name] = plugins.rewards(config.rewards, pool)
        except UserError as error:
            raise UserError(f"sets.{name}: {error}" if name else str(error)) from None
    return pool, rewards


def check_rewards(config: SamplingStageConfig) -> None:
    """Raises UserError if a reward does not exist or its options are wrong. Starts no worker."""
    plugins.rewards(config.rewards, WorkerPool())


class Sampler:
    """Samples completions from an engine with the config's model, or from an endpoint.

    The prompts are available at once. `start` must be called before the first completion.
    """

    def __init__(
        self, config: SamplingStageConfig, context: RunContext, endpoint: EndpointSettings | None
    ) -> None:
        """Connects to `endpoint`. If it is None, finds `config.model` and reads its tokenizer.

        Raises:
            UserError: The model, the prompts or the endpoint is wrong.
        """
        self._config = config
        self._context = context
        self._endpoint: Any = None
        self._model_dir: Path | None = None
        self.engine: Any = None
        self.prompts: Prompts | ChatPrompts
        if endpoint is not None:
            from grpo.engines.endpoint import Endpoint

            self._endpoint = Endpoint(endpoint, on_wait=context.signals.raise_if_received)
            self.prompts = ChatPrompts(config.prompt)
            return
        start = find_start_model(config, context)
        self.prompts = start.prompts
        self._model_dir = start.model_dir
        models.check_context(start.model_dir, config.max_sequence_tokens, config.length_keys)

    def start(self) -> None:
        """Starts the engine and waits until it is ready. Does nothing for an endpoint.

        Raises:
            UserError: The machine has too little memory.
        """
        config = self._config
        if self._model_dir is None:
            return
        model = EngineModel(
            model_dir=self._model_dir,
            num_weights=models.num_weights(self._model_dir),
            load_weights=True,
        )
        self.engine = start_engine(config, self._context, model)
        self.engine.wait_ready()
        if config.engine.servers and config.engine.servers.urls:
            # Servers that were started elsewhere have random weights or those of another run.
            with redirect_output(self._context.run.log_file("learner")):
                send_weights(self.engine, self._model_dir)

    def prompts_for(self, settings: PromptSettings) -> Prompts | ChatPrompts:
        """Returns the prompts of another section `prompt`, for the same model.

        Raises:
            UserError: The settings do not fit the tokenizer.
        """
        if settings == self._config.prompt:
            return self.prompts
        if self._model_dir is None:
            return ChatPrompts(settings)
        with redirect_output(self._context.run.log_file("learner")):
            tokenizer = models.load_tokenizer(self._model_dir)
            return Prompts(settings, tokenizer, models.eos_token_ids(self._model_dir))

    def with_settings(self, config: SamplingStageConfig, prompts: Prompts | ChatPrompts) -> Sampler:
        """Returns a sampler on the same engine with other sampling settings and prompts.

        Args:
            config: Its sections `sampling` and `seed` are used.
            prompts: The result of `prompts_for`.
        """
        sampler = copy.copy(self)
        sampler._config = config
        sampler.prompts = prompts
        return sampler

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
