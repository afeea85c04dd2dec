"""The loop of a fine-tuning: epochs, validation, early stopping, checkpoints; killed and run again, it goes on.

Everything random is a function of the seed and the step, so a resumed run is the same as one that was never stopped.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gura_jax import files, parallel
from gura_jax.dataset.run import is_out_of_memory
from gura_jax.errors import SystemConfigError, TrainingError
from gura_jax.evaluate import metrics
from gura_jax.evaluate.task import Task
from gura_jax.finetune import data, optimiser, scores, step, store
from gura_jax.finetune.data import Batch, Planned, Split
from gura_jax.finetune.scores import Best
from gura_jax.finetune.settings import Settings
from gura_jax.finetune.step import LAYER_LOGITS, Figures, Network, State, Weights
from gura_jax.finetune.store import Progress
from gura_jax.loading import load_model
from gura_jax.model import Model


class Result(NamedTuple):
    """Outcome of a fine-tuning.

    Attributes:
        epochs: that were trained.
        best_epoch: that of the saved model, from 1.
        chosen_by: name of the score that chose it.
        valid_score: its value.
        test: scores by name; empty if the task has no clips to test with.
        layer_weights: learned weights of the hidden states, by member.
    """

    epochs: int
    best_epoch: int
    chosen_by: str
    valid_score: float
    test: Mapping[str, float]
    layer_weights: Mapping[str, Sequence[float]]


def finetune(model: Model, task: Task, settings: Settings, out: Path, *, overwrite: bool = False) -> Result:
    """Fine-tune a system on a task, or go on with it.

    With several processes (``jax.distributed``), all call this with the same arguments and a folder that they share;
    each computes its part of every batch, and the first one writes.

    Args:
        model: with weights in float32.
        task: labelled clips; of cross-validation the first fold.
        settings: how.
        out: folder of the run, see :mod:`gura_jax.finetune.store`.
        overwrite: remove the run that is there.

    Raises:
        InputError: clips that cannot be read, are too short, or are all of one class.
        SystemConfigError: a system that cannot be trained so, or a batch that the devices do not divide.
        StoreError: the folder is another run's, or cannot be written.
        TrainingError: the loss is not finite, or the devices have no memory.
    """
    metrics.check_installed()
    run = _Run(model, task, settings, out)
    with contextlib.ExitStack() as stack:
        if run.writes:
            files.open_folder(out)
            stack.enter_context(files.locked(out))
            store.open_folder(out, run.description(), overwrite=overwrite)
        _wait("opened")  # for the first process
        if (out / store.RESULT).is_file():
            return Result(**files.read_json(out / store.RESULT))
        with _memory_errors(settings):
            return run.train()


class _Run:
    """A run: the task's clips, the network, and where they are."""

    def __init__(self, model: Model, task: Task, settings: Settings, out: Path) -> None:
        self.model, self.task, self.settings, self.out = model, task, settings, out
        processes = jax.process_count()
        self.writes = jax.process_index() == 0
        self.mesh = _joined(model.compilation, processes)
        devices = self.mesh.shape["data"]
        if settings.batch_size % (devices * settings.accumulate):
            raise SystemConfigError(
                f"batch size: expected a multiple of {devices * settings.accumulate} ({devices} devices, "
                f"{settings.accumulate} parts accumulated), found {settings.batch_size}"
            )
        share = settings.batch_size // processes
        self.rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        self.data = data.load(task, model, task.folds[0], settings.batch_size)
        self.epoch_steps = len(data.plan(self.data.train, self.data.buckets, settings.batch_size))
        self.net = step.network(model, settings, task.embedding, task.prediction)
        self.trained, self.frozen, self.scales = step.divide(model, self.net, settings, len(task.labels))

    def description(self) -> dict[str, Any]:
        """What a run in the same folder must be equal in."""
        digest = hashlib.sha256()
        for split in (self.data.train, self.data.valid, self.data.test):
            if split is not None:
                digest.update(json.dumps([split.names, split.lengths.tolist(), split.labels]).encode())
        return dataclasses.asdict(self.settings) | {
            "task": self.task.name,
            "labels": self.task.labels,
            "clips": digest.hexdigest(),
            "system": _describe(self.model),
            "architectures": {m.name: dataclasses.asdict(m.config) for m in self.model.fusion.members},
            "weights": self.model.weights,
        }

    def train(self) -> Result:
        """Train from the last checkpoint, or from the start, to the end."""
        settings, steps = self.settings, self.epoch_steps
        transformation = optimiser.adamw(settings, settings.epochs * steps)
        trained, frozen = step.place_replicated((self.trained, self.frozen), self.mesh)
        trained = jax.tree.map(jnp.copy, trained)  # steps donate them, and the model stays as it is
        moments = step.place_replicated(transformation.init(trained), self.mesh)
        state = State(trained, moments, step.place_replicated(np.int32(0), self.mesh))
        state, (done, best) = store.restore(self.out, state) or (state, Progress(0, Best()))
        if self.writes:
            store.cut_log(self.out, done)
        update = step.compile_step(step.train_step(self.net, transformation, self.scales, settings), state)
        predict = step.compile_predict(self.net, self.mesh)
        with _Log(self, done, best) as log:
            for epoch in range(done // steps, settings.epochs):
                if epoch - (best.epoch + 1) >= settings.patience:
                    break
                order = data.epoch_order(settings.seed, epoch)
                planned = data.plan(self.data.train, self.data.buckets, settings.batch_size, order)
                for batch in self.batches(self.data.train, planned[done - epoch * steps :]):
                    state, figures = update(state, frozen, batch)
                    log.dispatched(epoch, figures)
                    done += 1
                    if done % settings.checkpoint_steps == 0 and done % steps:
                        log.flush()
                        self.save(state, Progress(done, best))
                        log.saved = done
                log.check_last()
                probabilities, loss = self.predict(predict, state.trained, frozen, self.data.valid)
                log.check(loss, f"validation after step {done}")
                valid = scores.validate(self.task, self.model, self.data.valid, probabilities, loss)
                if better := best.is_beaten_by(valid.score, scores.maximizes(self.task)):
                    best = Best(valid.score, epoch, valid.postprocessing)
                    self.save_model(state.trained)
                log.flush(valid, better=better)
                self.save(state, Progress(done, best))
                log.saved, log.best = done, best
        return self.finish(done // steps, best)

    def batches(self, split: Split, planned: Sequence[Planned]) -> Iterator[Batch]:
        """Read batches and put them on the devices."""
        for batch in data.read(self.task, self.model, split, planned, self.settings.batch_size, self.rows):
            yield parallel.place_rows(batch, self.mesh)

    def predict(self, predict: Any, trained: Weights, frozen: Weights, split: Split) -> tuple[list[np.ndarray], float]:
        """Predict a split; returns probabilities of each clip, [C] or [T, C], and the mean loss."""
        planned = data.plan(split, self.data.buckets, self.settings.batch_size)
        out: dict[int, np.ndarray] = {}
        total = weight = 0.0
        for own, batch in zip(planned, self.batches(split, planned), strict=True):
            found = jax.device_get(predict(trained, frozen, batch))
            total, weight = total + float(found.loss_sum), weight + float(found.weight)
            for i, probabilities in zip(own.clips.tolist(), found.probabilities, strict=False):
                frames = self.model.num_frames(int(split.lengths[i]))
                out[i] = probabilities if self.task.embedding == "scene" else probabilities[:frames]
        return [out[i] for i in range(len(out))], total / weight

    def save(self, state: State, progress: Progress) -> None:
        """Write a checkpoint."""
        if self.writes:
            store.save(self.out, state, progress)

    def save_model(self, trained: Weights) -> None:
        """Write the model as it is now, and its head."""
        if self.writes:
            host = jax.tree.map(np.asarray, trained)
            self.tuned(host).save(self.out / store.MODEL, overwrite=True)
            store.save_head(self.out, host.head, self.task.labels)

    def tuned(self, trained: Weights) -> Model:
        """Return the model with trained weights: of the encoders, or of their hidden states."""
        if self.settings.part.kind != "layer-weights":
            return self.model.with_params(step.merge(trained, Weights({}, self.model.params)).members)
        learned = layer_weights(trained)
        members = tuple(
            dataclasses.replace(member, layers=learned.get(member.name, member.layers))
            for member in self.model.system.members
        )
        system = dataclasses.replace(self.model.system, members=members)
        m = self.model
        return Model(system, m.fusion, m.params, m.weights, m.compilation, m.dtype, m.platform)

    def finish(self, epochs: int, best: Best) -> Result:
        """Test the best model, as anyone who loads it would, and write the result."""
        _wait("trained")  # the first process has written it
        settings = self.settings
        model = load_model(
            self.out / store.MODEL,
            mesh=self.model.compilation.mesh,
            shard=self.model.compilation.shard,
            dtype=settings.dtype,
            precision=self.net.precision,
        )
        test: Mapping[str, float] = {}
        if self.data.test is not None:
            net = Network(model.fusion, {}, self.net.embedding, self.net.prediction, self.net.precision)
            weights = step.place_replicated(Weights(store.read_head(self.out), model.params), self.mesh)
            nothing = Weights({}, {name: {} for name in model.params})
            predict = step.compile_predict(net, self.mesh)
            probabilities, loss = self.predict(predict, weights, nothing, self.data.test)
            found = scores.test(self.task, model, self.data.test, probabilities, best.postprocessing)
            test = {"loss": loss} | found
        members = model.system.members if settings.part.kind == "layer-weights" else ()
        result = Result(
            epochs=epochs,
            best_epoch=best.epoch + 1,
            chosen_by=scores.chosen_by(self.task),
            valid_score=best.score,
            test=test,
            layer_weights={m.name: list(m.layers) for m in members if isinstance(m.layers, tuple)},
        )
        if self.writes:
            files.write_json(self.out, store.RESULT, result._asdict())
        _wait("finished")
        return result


def _describe(model: Model) -> dict[str, Any]:
    """The system as JSON has it; members say if they normalise, and runs of earlier versions say nothing else."""
    system = dataclasses.asdict(model.system)
    for member, built in zip(system["members"], model.fusion.members, strict=True):
        del member["normalise"]
        if built.options.normalise:
            member["normalise"] = True
    return system


def layer_weights(trained: Weights) -> dict[str, tuple[float, ...]]:
    """Return the softmax of the learned layer weights, by member, as ``Member.layers`` has them."""
    found = {}
    for name, own in trained.members.items():
        if LAYER_LOGITS in own:
            logits = np.asarray(own[LAYER_LOGITS], np.float64)
            weights = np.exp(logits - logits.max())
            found[name] = tuple((weights / weights.sum()).tolist())
    return found


class _Log:
    """The log and the console; a step's figures are waited for when the next one was dispatched.

    Args:
        run: the run.
        done: steps so far, which are in the checkpoint.
        best: validation so far.
    """

    def __init__(self, run: _Run, done: int, best: Best) -> None:
        from tqdm import tqdm

        self.run, self.saved, self.best, self.steps = run, done, best, done
        total = run.settings.epochs * run.epoch_steps
        self.rate = optimiser.schedule(run.settings, total)
        self.waiting: tuple[int, Figures] | None = None
        self.losses: list[float] = []
        self.bar = tqdm(total=total, initial=done, unit="step", disable=None if run.writes else True)
        self.bar.set_description("compiling")

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def dispatched(self, epoch: int, figures: Figures) -> None:
        """Note a step's figures, and write the row of the one before."""
        self.flush()
        self.waiting = epoch, figures

    def check_last(self) -> None:
        """Wait for the last step, and refuse a loss or gradient that is not finite."""
        if self.waiting is not None:
            figures = self.waiting[1]
            self.check(float(figures.loss), f"step {self.steps + 1}")
            self.check(float(figures.gradient_norm), f"step {self.steps + 1}", "gradient")

    def check(self, value: float, where: str, what: str = "loss") -> None:
        """Refuse a number that is not finite."""
        if not math.isfinite(value):
            best = f" and the model of epoch {self.best.epoch + 1}" if self.best.epoch >= 0 else ""
            kept = f"keeps the checkpoint of step {self.saved}{best}" if self.saved else "has no checkpoint yet"
            raise TrainingError(
                f"{where}: expected a finite {what}, found {value}: lower the learning rate or lengthen the warm-up, "
                f"in another folder; {self.run.out} {kept}"
            )

    def flush(self, valid: scores.Validation | None = None, *, better: bool = False) -> None:
        """Check the last step and write its row, with the validation after it if there was one."""
        if self.waiting is None:
            return
        self.check_last()
        (epoch, figures), self.waiting = self.waiting, None
        self.steps += 1
        self.losses.append(float(figures.loss))
        self.bar.set_description("training", refresh=False)
        self.bar.update()
        if not self.run.writes:
            return
        row: dict[str, Any] = {
            "step": self.steps,
            "epoch": epoch + 1,
            "loss": float(figures.loss),
            "gradient_norm": float(figures.gradient_norm),
            "learning_rate": float(np.asarray(self.rate(self.steps - 1))),
        }
        if valid is not None:
            row |= {"valid_loss": valid.loss, "valid_score": valid.score}
            self._print(epoch, valid, better)
        store.append_row(self.run.out, row)

    def _print(self, epoch: int, valid: scores.Validation, better: bool) -> None:
        mean, self.losses = sum(self.losses) / len(self.losses), []
        self.bar.clear()
        print(
            f"epoch {epoch + 1} of {self.run.settings.epochs}: loss {mean:.4f}, validation loss {valid.loss:.4f}, "
            f"{scores.chosen_by(self.run.task)} {valid.score:.4f}{' (best so far)' if better else ''}",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def _memory_errors(settings: Settings) -> Iterator[None]:
    """Say what to change where the devices have no memory left."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        part = settings.batch_size // settings.accumulate
        raise TrainingError(
            f"the devices have no memory for {part} clips at once: accumulate over more parts (--accumulate, "
            f"now {settings.accumulate}), recompute layers (--remat layers), train fewer blocks (--train last:N), cut "
            "long clips, or lower --batch-size"
        ) from None


def _joined(compilation: parallel.Compilation, processes: int) -> Mesh:
    """Return the mesh that batches are divided over: the model's, or of several processes all devices."""
    if processes == 1:
        return compilation.mesh
    if compilation.shard is not None or parallel.is_several_processes(compilation.mesh):
        raise SystemConfigError(
            f"expected a model with whole weights on the devices of its process, of which {processes} are joined here, "
            f"found the mesh {dict(compilation.mesh.shape)} and shard={compilation.shard!r}: load it without them"
        )
    return parallel.make_mesh(jax.devices())


def _wait(name: str) -> None:
    """Wait for all processes to come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"gura_jax.finetune: {name}")
