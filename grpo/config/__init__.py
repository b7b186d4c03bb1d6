"""The configuration: one YAML file per run, validated before any large library is imported.

Each key is described where it is declared:

    model.py      section `model`
    algorithm.py  section `algorithm`; presets.py has the published recipes
    sections.py   the other sections that several commands share
    train.py      the config of `grpo train` and the bases of all configs
    stages.py     the configs of the other commands, and their own sections

reading.py reads YAML files and overrides. The package must not depend on torch.
"""

from grpo.config.model import LoraSettings, ModelSettings, QatSettings, RopeSettings
from grpo.config.reading import Section, apply_overrides, explain, read_yaml, replace_values
from grpo.config.sections import (
    CheckpointSettings,
    DataSetSettings,
    DataSettings,
    EngineSettings,
    EvalSettings,
    LearnerSettings,
    LoggingSettings,
    ProbeSettings,
    PromptSettings,
    RewardPoolSettings,
    RewardSettings,
    SamplingSettings,
    ServerSettings,
    TrainSettings,
)
from grpo.config.stages import (
    CollectConfig,
    CollectSettings,
    DistillConfig,
    EndpointSettings,
    EvalConfig,
    EvalDataSettings,
    EvalSetSettings,
    PipelineConfig,
    PipelineEvalSettings,
    PipelineStageSettings,
    QuantizeConfig,
    QuantizeSettings,
    SftConfig,
    SftLearnerSettings,
    SftSettings,
    SoftTargetSettings,
)
from grpo.config.train import RunConfig, SamplingStageConfig, TrainConfig, dump, load, parse

__all__ = [
    "CheckpointSettings",
    "CollectConfig",
    "CollectSettings",
    "DataSetSettings",
    "DataSettings",
    "DistillConfig",
    "EndpointSettings",
    "EngineSettings",
    "EvalConfig",
    "EvalDataSettings",
    "EvalSetSettings",
    "EvalSettings",
    "LearnerSettings",
    "LoggingSettings",
    "LoraSettings",
    "ModelSettings",
    "PipelineConfig",
    "PipelineEvalSettings",
    "PipelineStageSettings",
    "ProbeSettings",
    "PromptSettings",
    "QatSettings",
    "QuantizeConfig",
    "QuantizeSettings",
    "RewardPoolSettings",
    "RewardSettings",
    "RopeSettings",
    "RunConfig",
    "SamplingSettings",
    "SamplingStageConfig",
    "Section",
    "ServerSettings",
    "SftConfig",
    "SftLearnerSettings",
    "SftSettings",
    "SoftTargetSettings",
    "TrainConfig",
    "TrainSettings",
    "apply_overrides",
    "dump",
    "explain",
    "load",
    "parse",
    "read_yaml",
    "replace_values",
]
