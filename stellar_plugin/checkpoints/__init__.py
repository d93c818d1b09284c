"""Weights of every layout into our models, and ours into other layouts."""

from stellar_plugin.checkpoints.checkpoint import Checkpoint
from stellar_plugin.checkpoints.files import HEADS_NAME, WEIGHTS_NAME, save_encoder
from stellar_plugin.checkpoints.heads import load_head_weights, save_heads
from stellar_plugin.checkpoints.load import (
    LoadReport,
    create_encoder,
    load_encoder,
    load_encoder_weights,
    load_model_weights,
    load_network,
    untrained_encoder,
    untrained_network,
)
from stellar_plugin.checkpoints.readers import HEADS
from stellar_plugin.checkpoints.recognise import read_checkpoint
from stellar_plugin.checkpoints.sizes import (
    NUMERICS,
    encoder_config,
    inherited,
    model_config,
    numerics,
)
from stellar_plugin.weight_files import CONFIG_NAME

__all__ = [
    "CONFIG_NAME",
    "HEADS",
    "HEADS_NAME",
    "NUMERICS",
    "WEIGHTS_NAME",
    "Checkpoint",
    "LoadReport",
    "create_encoder",
    "encoder_config",
    "inherited",
    "load_encoder",
    "load_encoder_weights",
    "load_head_weights",
    "load_model_weights",
    "load_network",
    "model_config",
    "numerics",
    "read_checkpoint",
    "save_encoder",
    "save_heads",
    "untrained_encoder",
    "untrained_network",
]
