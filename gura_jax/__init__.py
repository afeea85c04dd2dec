"""gura_jax: the fused audio embeddings of NTU-GURA (HEAR 2021) in JAX and Flax."""

from gura_jax.dataset.reader import EmbeddingStore
from gura_jax.errors import (
    AudioError,
    CheckpointError,
    ConversionError,
    GuraError,
    InputError,
    StoreError,
    SystemConfigError,
)
from gura_jax.loading import load_model
from gura_jax.model import ClipEmbedding, Model
from gura_jax.models.encoder import Encoder, Family, FrameGrid, Options, Output, Preset
from gura_jax.models.families import ENCODERS, FAMILIES, register
from gura_jax.systems import SYSTEMS, Member, System

__version__ = "0.1.0"

__all__ = [
    "ENCODERS",
    "FAMILIES",
    "SYSTEMS",
    "AudioError",
    "CheckpointError",
    "ClipEmbedding",
    "ConversionError",
    "EmbeddingStore",
    "Encoder",
    "Family",
    "FrameGrid",
    "GuraError",
    "InputError",
    "Member",
    "Model",
    "Options",
    "Output",
    "Preset",
    "StoreError",
    "System",
    "SystemConfigError",
    "load_model",
    "register",
]
