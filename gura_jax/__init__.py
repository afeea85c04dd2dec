"""gura_jax: the fused audio embeddings of NTU-GURA (HEAR 2021) in JAX and Flax."""

from gura_jax.dataset.store import EmbeddingStore
from gura_jax.errors import (
    AudioError,
    CheckpointError,
    ConversionError,
    GuraError,
    InputError,
    StoreError,
    SystemConfigError,
)
from gura_jax.model import ClipEmbedding, Model, load_model
from gura_jax.models.encoder import Encoder
from gura_jax.systems import ENCODERS, SYSTEMS, EncoderEntry, Member, System

__version__ = "0.1.0"

__all__ = [
    "ENCODERS",
    "SYSTEMS",
    "AudioError",
    "CheckpointError",
    "ClipEmbedding",
    "ConversionError",
    "EmbeddingStore",
    "Encoder",
    "EncoderEntry",
    "GuraError",
    "InputError",
    "Member",
    "Model",
    "StoreError",
    "System",
    "SystemConfigError",
    "load_model",
]
