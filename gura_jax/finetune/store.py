"""The folder of a fine-tuning: what run it is, its log, and a checkpoint of the whole state.

DIR/run.json      settings, system, weights and clips; another run is refused
DIR/log.csv       a row a step; validations in the last row of an epoch
DIR/checkpoint/   Orbax: trained weights and the optimiser's moments; progress.json: step and best validation
DIR/model/        the model at the best validation so far, as Model.save writes it; DIR/head.npz: its head
DIR/result.json   scores, when it is finished
"""

import contextlib
import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gura_jax import files
from gura_jax.checkpoint import orbax_checkpointer
from gura_jax.errors import CheckpointError, StoreError
from gura_jax.finetune.scores import Best

RUN, LOG, CHECKPOINT, MODEL, HEAD, RESULT = "run.json", "log.csv", "checkpoint", "model", "head.npz", "result.json"
ARRAYS, PROGRESS = "arrays", "progress.json"  # in the checkpoint
COLUMNS = ("step", "epoch", "loss", "gradient_norm", "learning_rate", "valid_loss", "valid_score")
NAMED = 5  # differences in a message


class Progress(NamedTuple):
    """How far a run is, beside its arrays."""

    step: int
    best: Best


def open_folder(folder: Path, described: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Begin a run in a folder, or go on with the same run. The caller holds the folder's lock.

    Args:
        folder: of the run; exists.
        described: the run, as JSON has it.
        overwrite: remove the run that is there.

    Raises:
        StoreError: another run or anything else is there, or the folder cannot be written.
    """
    if overwrite and (folder / RUN).is_file():
        for name in (CHECKPOINT, MODEL):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (HEAD, LOG, RESULT, RUN):  # that it is a run, last
            (folder / name).unlink(missing_ok=True)
    found = [path.name for path in folder.iterdir() if path.name != files.LOCK_FILE and not path.name.startswith(".")]
    if RUN not in found:
        if found:
            raise StoreError(f"{folder}: expected an empty folder or a fine-tuning, found {', '.join(found[:NAMED])}")
        files.write_json(folder, RUN, described)
        return
    try:
        there = json.loads((folder / RUN).read_bytes())
        own = {**there}
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{folder / RUN} cannot be read ({error}): choose another folder") from None
    here = json.loads(json.dumps(described))
    other = [
        f"{key} {here.get(key)!r} here, {own.get(key)!r} there"
        for key in {**here, **own}
        if here.get(key) != own.get(key)
    ]
    if other:
        raise StoreError(
            f"{folder} holds another fine-tuning: {'; '.join(other[:NAMED])}: choose another folder, or pass "
            "--overwrite"
        )


def append_row(folder: Path, row: Mapping[str, Any]) -> None:
    """Append a row to the log; columns that it lacks stay empty."""
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writerow(row)
    try:
        with open(folder / LOG, "a", encoding="utf-8") as file:
            file.write(text.getvalue())
    except OSError as error:
        raise files.cannot_write(folder, error) from None


def cut_log(folder: Path, steps: int) -> None:
    """Begin the log, or drop the rows of a killed run after so many steps."""
    lines: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines(keepends=True)[1 : 1 + steps]
    files.write_file(folder, LOG, (",".join(COLUMNS) + "\n" + "".join(lines)).encode())


def save(folder: Path, state: Any, progress: Progress) -> None:
    """Write a checkpoint, which replaces the one before as a whole.

    Args:
        folder: of the run.
        state: a pytree of arrays, of which this process has the whole.
        progress: what belongs to it.

    Raises:
        StoreError: it cannot be written.
    """
    import orbax.checkpoint as ocp

    arrays = {name: np.asarray(array) for name, array in _named(state).items()}
    try:
        with files.new_folder(folder / CHECKPOINT) as temporary:
            with orbax_checkpointer(arrays.values(), alone=True) as checkpointer:
                checkpointer.save((temporary / ARRAYS).resolve(), args=ocp.args.PyTreeSave(arrays))
            files.write_json(temporary, PROGRESS, {"step": progress.step, "best": progress.best._asdict()})
    except (OSError, ValueError) as error:  # TensorStore's, as when the disk is full
        raise StoreError(f"cannot write the checkpoint {folder / CHECKPOINT}: {error}") from None


def restore(folder: Path, like: Any) -> tuple[Any, Progress] | None:
    """Read the checkpoint, if there is one.

    Args:
        folder: of the run.
        like: a state with arrays of the same shapes and placement.

    Raises:
        CheckpointError: it is damaged.
    """
    import orbax.checkpoint as ocp

    path = folder / CHECKPOINT
    files.recover_folder(path)
    if not path.exists():
        return None
    named = _named(like)
    try:
        content = json.loads((path / PROGRESS).read_bytes())
        best = content["best"]
        progress = Progress(
            int(content["step"]),
            Best(best["score"], best["epoch"], tuple((name, value) for name, value in best["postprocessing"])),
        )
        arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in named}
        with orbax_checkpointer(named.values(), alone=True) as checkpointer:
            found = checkpointer.restore(
                (path / ARRAYS).resolve(), args=ocp.args.PyTreeRestore(dict(named), restore_args=arguments)
            )
        arrays = [_placed(found[name], array) for name, array in named.items()]
    except Exception as error:  # whatever Orbax and TensorStore say of a damaged folder
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{path} cannot be read ({reason}): remove it to start again, or restore a copy"
        ) from None
    return jax.tree.unflatten(jax.tree.structure(like), arrays), progress


def save_head(folder: Path, head: Mapping[str, np.ndarray], labels: Sequence[str]) -> None:
    """Write a head: kernel [D, C], bias [C] and the labels of its classes."""
    content = io.BytesIO()
    np.savez(content, kernel=head["kernel"], bias=head["bias"], labels=np.array(labels, np.str_))
    files.write_file(folder, HEAD, content.getvalue())


def read_head(folder: Path) -> dict[str, np.ndarray]:
    """Read a head's kernel and bias.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with np.load(folder / HEAD, allow_pickle=False) as content:
            return {name: content[name] for name in ("kernel", "bias")}
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / HEAD} cannot be read ({error}): restore it from a copy") from None


def _named(state: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _placed(host: np.ndarray, like: jax.Array) -> jax.Array:
    if (host.shape, host.dtype) != (like.shape, like.dtype):
        raise ValueError(f"expected {like.dtype}{list(like.shape)}, found {host.dtype}{list(host.shape)}")
    return jax.make_array_from_callback(host.shape, like.sharding, lambda index: host[index])
