"""`grpo eval`: a train config's model on its held-out problems, sampled and judged as the training would. Experience only: no learner."""

from __future__ import annotations

from grpo import models, plugins, rollout
from grpo.config import Config
from grpo.loop import sample_rows, sampling_options
from grpo.stages._run import held_out, load_problems, mixture, open_stage, prepare, start_engine
from grpo.types import UserError
from rewards._pool import Pool


def eval(config: Config, *, resume: bool) -> None:
    """Writes `eval/` metrics and every completion into the run directory."""
    if resume:
        raise UserError("grpo eval: an evaluation is not resumed; start it again in another run_dir")
    if config.model.warm_start:
        raise UserError("grpo eval judges model.path as it is: give model.path=RUN/final, and model.warm_start= (nothing)")
    pool = Pool(config.reward_pool.workers, memory_gb=config.reward_pool.memory_gb)
    rewards = plugins.rewards(config.rewards, pool)
    data = config.eval.data or config.data
    problems = load_problems(data, "test", config.seed)
    with open_stage(config, "eval", total=1, unit="evaluation", resume=False) as stage:
        stage.stack.callback(pool.close)
        model_dir, _, prompts = prepare(config, stage.run)
        models.check_context(model_dir, config.max_sequence_tokens)
        chosen = held_out(mixture(data, problems, prompts, 0), config.eval.problems)
        engine = start_engine(config, stage, model_dir, models.num_weights(model_dir), load_weights=True)
        stage.display.begin(0)
        metrics, scored = rollout.evaluate(
            engine, prompts, chosen, rewards, sampling_options(config, prompts, config.eval.temperature), samples=config.eval.samples,
            run_seed=config.seed, on_progress=lambda done, total: stage.display.phase(0, "sampling", f"{done}/{total}"),
        )  # fmt: skip
        stage.run.write_samples("eval-000000", sample_rows(scored, config.algorithm.advantage))
        stage.record({"step": 0, **metrics})
        for name, value in metrics.items():
            if not name.endswith(("tokens", "missing", "length_max")):
                stage.display.say(f"{name:32} {value:.3f}")
