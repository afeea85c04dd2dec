"""What gura_jax is measured beside: other ways to run the published recipe, one row each."""

import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gura_jax import System

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent
MATRIX = 2048  # of the square float32 product whose rate is the machine's
FLAX_MODEL = "FlaxWav2Vec2Model"  # of transformers 4 alone
FORMATS = {"onnx": "onnx", "openvino": "xml"}  # of exported networks, and their files' suffixes
# Relative distance of the frames, over which two contenders did not do the same work.
SAME_FLOAT32, SAME_BFLOAT16 = 1e-4, 0.2

Embed = Callable[[Sequence[np.ndarray]], Any]


class Loaded(NamedTuple):
    """A contender's function from clips to frames, and its float32 product of two matrices of :data:`MATRIX`."""

    embed: Embed
    product: Callable[[], object]


class Package(NamedTuple):
    """What a peer needs beyond the core, in a folder of its own, as it need not agree with what the core needs.

    The Makefile installs it: ``make benchmarks/.FOLDER/installed``.
    """

    name: str
    folder: Path

    @property
    def version(self) -> str | None:
        """Of what is installed, there or beside the core; None: nothing is."""
        path = [str(self.folder), *sys.path]
        return next((found.version for found in importlib.metadata.distributions(name=self.name, path=path)), None)


class Peer(NamedTuple):
    """Another way to run the recipe.

    Attributes:
        load: (system, weights by member) -> the contender.
        package: beyond the core's.
        export: the format that it reads networks in, see :mod:`export`; None: PyTorch's own.
        same: relative distance of the frames, over which it did not do the same work.
        systems: that it can run; None: all.
    """

    load: Callable[[System, Mapping[str, Path]], Loaded]
    package: Package | None = None
    export: str | None = None
    same: float = SAME_FLOAT32
    systems: tuple[str, ...] | None = None


def exported(weights: Path, form: str) -> Path:
    """The file of a network that was exported, from the path of its weights."""
    return weights.parent / "exported" / form / weights.name / f"network.{FORMATS[form]}"


def with_torch(mode: str) -> Callable[[System, Mapping[str, Path]], Loaded]:
    def load(system: System, weights: Mapping[str, Path]) -> Loaded:
        import torch
        from torch_recipe import Recipe

        torch.set_num_threads(cores())
        x = torch.randn(MATRIX, MATRIX)
        return Loaded(Recipe.load(system, weights, mode).timestamp_embeddings, lambda: x @ x)

    return load


def with_onnx(system: System, weights: Mapping[str, Path]) -> Loaded:
    """ONNX Runtime, all graph optimisations."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL

    def network(model: str | bytes) -> Callable[[np.ndarray], np.ndarray]:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: session.run(None, {name: x})[0]

    return _with_networks(
        system, {n: network(str(exported(p, "onnx"))) for n, p in weights.items()}, network(_product())
    )


def with_openvino(precision: str) -> Callable[[System, Mapping[str, Path]], Loaded]:
    """OpenVINO, one request at a time on all cores."""

    def load(system: System, weights: Mapping[str, Path]) -> Loaded:
        import openvino  # pyright: ignore[reportMissingImports]

        core = openvino.Core()

        def network(model: str | bytes, precision: str) -> Callable[[np.ndarray], np.ndarray]:
            settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": cores()}
            compiled = core.compile_model(
                core.read_model(model), "CPU", settings | {"INFERENCE_PRECISION_HINT": precision}
            )
            return lambda x: compiled(x)[0]

        networks = {name: network(str(exported(path, "openvino")), precision) for name, path in weights.items()}
        return _with_networks(system, networks, network(_product(), "f32"))

    return load


def _with_networks(
    system: System,
    networks: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    product: Callable[[np.ndarray], np.ndarray],
) -> Loaded:
    """The recipe with another runtime's networks."""
    import torch
    from torch_recipe import Recipe

    torch.set_num_threads(cores())

    def on_tensors(network: Callable[[np.ndarray], np.ndarray]) -> "Callable[[torch.Tensor], torch.Tensor]":
        return lambda x: torch.from_numpy(network(x.numpy()))

    recipe = Recipe(system, {name: on_tensors(network) for name, network in networks.items()})
    x = np.random.default_rng(0).standard_normal((MATRIX, MATRIX), np.float32)
    return Loaded(recipe.timestamp_embeddings, lambda: product(x))


def _product() -> bytes:
    """The product of a matrix with itself, as an ONNX model."""
    import onnx  # pyright: ignore[reportMissingImports]

    text = '<ir_version: 10, opset_import: ["": 18]> product (float[N, N] x) => (float[N, N] y) { y = MatMul(x, x) }'
    return onnx.parser.parse_model(text).SerializeToString()


def with_flax(system: System, weights: Mapping[str, Path]) -> Loaded:
    """transformers 4's own Flax wav2vec 2.0, the mean of all hidden states."""
    import jax
    import transformers

    import gura_jax.convert.references  # noqa: F401 - mends a torchaudio that fails

    (path,) = weights.values()
    kind: Any = getattr(transformers, FLAX_MODEL)
    model = kind.from_pretrained(path, from_pt=True)

    @jax.jit
    def frames(params: Any, audio: jax.Array) -> Any:
        states = model(audio, params=params, output_hidden_states=True).hidden_states
        return sum(states) / len(states)

    def embed(clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        batches = [clips] if len({len(clip) for clip in clips}) == 1 else [[clip] for clip in clips]
        return [np.asarray(x) for batch in batches for x in frames(model.params, np.stack(batch))]

    return Loaded(embed, jax_product())


def with_gura_jax(system: System, weights: Mapping[str, Path], **options: Any) -> Loaded:
    """Ours; ``options`` as of ``load_model``."""
    from gura_jax import load_model

    model = load_model(system, weights=weights, **options)
    return Loaded(lambda clips: model.timestamp_embeddings(list(clips))[0], jax_product())


def jax_product() -> Callable[[], object]:
    import jax
    import jax.numpy as jnp

    x = jnp.asarray(np.random.default_rng(0).standard_normal((MATRIX, MATRIX)), jnp.float32)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    return lambda: product(x).block_until_ready()


def cores() -> int:
    """Threads of a contender."""
    return os.cpu_count() or 1


_FLAX = Package("transformers", HERE / ".flax")
_ONNX, _OPENVINO = Package("onnxruntime", HERE / ".peers"), Package("openvino", HERE / ".peers")
PEERS: Mapping[str, Peer] = {
    "eager": Peer(with_torch("eager")),
    "compile": Peer(with_torch("compile")),
    "bfloat16": Peer(with_torch("bfloat16"), same=SAME_BFLOAT16),
    "bfloat16-compile": Peer(with_torch("bfloat16-compile"), same=SAME_BFLOAT16),
    "flax": Peer(with_flax, _FLAX, systems=("fusion_wav2vec2",)),  # it has no HuBERT
    "onnx": Peer(with_onnx, _ONNX, "onnx"),
    "openvino": Peer(with_openvino("f32"), _OPENVINO, "openvino"),
    "openvino-bfloat16": Peer(with_openvino("bf16"), _OPENVINO, "openvino", SAME_BFLOAT16),
}
