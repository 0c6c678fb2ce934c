"""One tree of typed, frozen settings; loaded from YAML, changed by ``key.sub=value``, saved with every run."""

from llava_scale.config.compressor import CompressorConfig
from llava_scale.config.data import DataConfig, PackingConfig, SourceConfig
from llava_scale.config.load import load_config, save_config, to_dict, to_yaml
from llava_scale.config.model import ModelConfig, ProjectorConfig
from llava_scale.config.train import Config, TrainConfig

__all__ = [
    "CompressorConfig",
    "Config",
    "DataConfig",
    "ModelConfig",
    "PackingConfig",
    "ProjectorConfig",
    "SourceConfig",
    "TrainConfig",
    "load_config",
    "save_config",
    "to_dict",
    "to_yaml",
]
