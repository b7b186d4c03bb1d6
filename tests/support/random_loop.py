"""A training loop with a real learner and an engine that draws tokens at random."""

import random
from types import SimpleNamespace

from tiny_models import tiny_config

from grpo.engines import SyncReport
from grpo.experience import plugins
from grpo.experience.selection import Selection
from grpo.learning import lora, models
from grpo.learning.learner import Learner
from grpo.metrics import roofline
from grpo.run.directory import RunDirectory
from grpo.training.journal import Journal
from grpo.training.loop import Loop
from grpo.training.rollouts import Rollouts
from grpo.training.updates import Updater
from grpo.training.weight_sync import ProbeReport
from grpo.types import Completion, Problem
from rewards.workers.pool import Pool


class RandomEngine:
    """Tokens are a function of the seed.

    Of a completion that begins with an even one the reward is 1.
    """

    version = -1

    def generate(self, requests, options, on_progress=None):
        return [
            tuple(self._completion(request.seed + i) for i in range(request.n))
            for request in requests
        ]

    def prove(self, requests, options):
        return [self.generate(requests, options)]

    def _completion(self, seed):
        generator = random.Random(seed)
        ids = tuple(generator.randrange(10, 200) for _ in range(generator.randrange(2, 9)))
        logprobs = tuple(-4 - generator.random() for _ in ids)
        reason = "length" if len(ids) == 8 else "stop"
        return Completion(
            token_ids=ids,
            logprobs=logprobs,
            text="",
            finish_reason=reason,
            versions=((self.version, 0, len(ids)),),
        )

    def load_weights(self, weights, version):
        self.weights = {name: weight.clone() for name, weight in weights}
        self.version = version
        return SyncReport(version=version, seconds=0.0, num_bytes=0)

    def reset_cache(self): ...
    def sleep(self): ...
    def wake(self): ...


def make_loop(tmp_path, tiny, resume=False, reward=None, take=None, kind="tiny-qwen2", **sections):
    base = {
        "train": {"rollouts": 3, "problems": 4, "group_size": 4},
        "learner": {"lr": 1e-3, "zero_stage": 1},
        "rewards": {"accuracy": 1.0},
    }
    config = tiny_config(tmp_path, tiny(kind), **{**base, **sections})
    model, reference = models.load_model(tiny(kind), "packed"), None
    if config.model.lora:
        lora.add_adapters(model, config.model.lora, "tiny", config.seed)
    elif config.algorithm.kl_coef or config.model.teacher:
        reference = models.load_model(
            tiny(kind, intermediate_size=128) if config.model.teacher else tiny(kind), "packed"
        )
    learner = Learner(
        model,
        config,
        plugins.find_function("grpo.losses", config.algorithm.loss, "loss", "loss"),
        reference,
    )
    reward = reward or (lambda completion, problem: float(completion.token_ids[0] % 2 == 0))
    rewards = {
        "even": (
            lambda groups, _: [
                [reward(c, group.problem) for c in group.completions] for group in groups
            ],
            1.0,
        )
    }

    def problem(i):
        return Problem(id=f"p{i % 40}", question="", answer="", source="t")

    take = take or (lambda position, n: [problem(position + i) for i in range(n)])
    run, engine = RunDirectory(str(tmp_path), resume=resume), RandomEngine()
    display = SimpleNamespace(
        phase=lambda *_: None, begin=lambda *_: None, say=lambda *_: None, row=lambda *_: None
    )
    prompts = SimpleNamespace(
        ids=lambda problem: (5, 6, 7 + int(problem.id[1:])),
        prefill=lambda problem: "",
        for_rewards=lambda problem: "",
        stop=(),
        stop_token_ids=(),
    )
    loop = Loop(
        config=config,
        run=run,
        engine=engine,
        rollouts=Rollouts(
            config=config,
            engine=engine,
            prompts=prompts,
            rewards=rewards,
            selection=Selection(algorithm=config.algorithm, size=config.train.problems, take=take),
            workers=Pool(),
            display=display,
        ),
        updater=Updater(config=config, learner=learner),
        weight_check=SimpleNamespace(
            probe=lambda: ProbeReport(gap=0.0, max_gap=1.0), canary=lambda version, signals: 0.0
        ),
        journal=Journal(
            record_row=run.append_metrics, display=display, alarm_rules=config.logging.alarms
        ),
        signals=SimpleNamespace(check=lambda: None),
        display=display,
        machine=roofline.Machine(flops=1e9, bandwidth=1e9),
        shape=roofline.model_shape(tiny(kind), 100_000, "float32"),
    )
    if resume:
        learner.load(run.latest())
        loop.resume(run.read_state(run.latest()))
    else:
        loop.run.update_manifest(stage="train")
    loop.start(fresh=not resume)
    return loop
