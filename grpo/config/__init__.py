"""The configuration: one YAML file per run, validated before any large library is imported.

Each key is described where it is declared:

    model.py      section `model`
    algorithm.py  section `algorithm`; presets.py has the published recipes
    sections.py   the other sections that several commands share
    train.py      the config of `grpo train` and the bases of all configs
    stages.py     the configs of the other commands, and their own sections

reading.py reads YAML files and overrides. The package must not depend on torch.
"""

from grpo.config.model import Lora, Model, Qat, Rope
from grpo.config.reading import Section, apply_overrides, explain, read_yaml
from grpo.config.sections import (
    Checkpoint,
    Data,
    Engine,
    Eval,
    Learner,
    Logging,
    Probe,
    Prompt,
    Reward,
    RewardPool,
    Sampling,
    Servers,
    Source,
    Train,
)
from grpo.config.stages import (
    Collect,
    CollectConfig,
    DistillConfig,
    EvalConfig,
    Judged,
    PipelineConfig,
    Quantize,
    QuantizeConfig,
    Sft,
    SftConfig,
    SftLearner,
    Soft,
    Step,
    Teacher,
)
from grpo.config.train import Config, RunConfig, SampledConfig, dump, load, parse

__all__ = [
    "Checkpoint",
    "Collect",
    "CollectConfig",
    "Config",
    "Data",
    "DistillConfig",
    "Engine",
    "Eval",
    "EvalConfig",
    "Judged",
    "Learner",
    "Logging",
    "Lora",
    "Model",
    "PipelineConfig",
    "Probe",
    "Prompt",
    "Qat",
    "Quantize",
    "QuantizeConfig",
    "Reward",
    "RewardPool",
    "Rope",
    "RunConfig",
    "SampledConfig",
    "Sampling",
    "Section",
    "Servers",
    "Sft",
    "SftConfig",
    "SftLearner",
    "Soft",
    "Source",
    "Step",
    "Teacher",
    "Train",
    "apply_overrides",
    "dump",
    "explain",
    "load",
    "parse",
    "read_yaml",
]
