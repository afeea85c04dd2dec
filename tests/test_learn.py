"""Learned fusion: mixers of tokens, the search of members, statistics, and the systems that are written."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import relative
from scipy import stats
from test_evaluate import write_task
from typer.testing import CliRunner

from gura_jax import EmbeddingStore, Member, System, cli
from gura_jax.dataset.fused import Fuser, fuse_scenes
from gura_jax.errors import InputError, StoreError
from gura_jax.evaluate import learn as learning
from gura_jax.evaluate import probes
from gura_jax.evaluate.benchmarks import find_protocol
from gura_jax.evaluate.embed import SystemEmbeddings
from gura_jax.evaluate.hear.tasks import read_task
from gura_jax.evaluate.probes import Mixer, Point
from gura_jax.evaluate.statistics import compare, holm
from gura_jax.systems import read_system, write_system

FUSED_BOUND = 1e-6  # float32 sums in another order
ENSEMBLE = System("two", (Member("hubert-base", "mean"), Member("crepe-tiny")), "interleave", 32)
GRID = {"hidden_layers": [1], "hidden_dim": [8], "lr": [1e-2], "max_epochs": [4], "patience": [2]}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("learn")
    grid = {"evaluation_params": {"task_specific_param_grid": GRID}, "split_mode": "new_split_kfold", "nfolds": 3}
    task = read_task(write_task(folder / "task", clips=3, **grid))
    return folder, task, _learn(task, folder / "out")


def _learn(task: Any, out: Path, system: System = ENSEMBLE) -> learning.Learned:
    benchmark, protocol = find_protocol("fixed")
    return learning.learn(task, SystemEmbeddings(system, "random", "tiny"), out, benchmark, protocol, range(2))


def test_every_way_is_compared(learned: Any) -> None:
    folder, task, found = learned
    ways = ["equal", "layers", "joint", "attention", "hubert-base", "crepe-tiny"]
    assert [result.name for result in found.results] == ways
    assert all(len(result.test) == len(result.validation) == 2 * len(task.folds) for result in found.results)
    equal = np.asarray(found.results[0].test)
    for result in found.results[1:]:
        assert result.gain.mean == pytest.approx((np.asarray(result.test) - equal).mean())
        assert result.p is not None
    best = max(found.results, key=lambda result: np.mean(result.validation))
    assert np.mean(best.validation) == np.mean({r.name: r for r in found.results}[found.best].validation)
    without = {"hubert-base": "crepe-tiny", "crepe-tiny": "hubert-base"}
    for member, other in without.items():
        scores = {result.name: result.test for result in found.results}[other]
        assert found.ablation[member].mean == pytest.approx((equal - np.asarray(scores)).mean())
    written = json.loads((folder / "out" / "task" / learning.LEARNED).read_text())
    assert written["best"] == found.best
    text = learning.as_text(found)
    assert all(way in text for way in ways)
    assert "gained from crepe-tiny" in text


def test_weights_are_shares(learned: Any) -> None:
    _, _, found = learned
    layers, joint, attention = (found.results[i].weights for i in (1, 2, 3))
    assert len(found.tokens) == len(layers) == len(joint) == 5
    assert found.tokens[0] == ("hubert-base", 0)
    assert found.tokens[4] == ("crepe-tiny", None)
    assert sum(layers[:4]) == pytest.approx(1)
    assert layers[4] == pytest.approx(1)
    assert sum(joint) == pytest.approx(1)
    assert np.ptp(layers[:4]) > 0  # they have been learned
    assert attention == ()


def test_it_goes_on(learned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, task, found = learned

    def trains(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(learning, "evaluate_task", trains)
    assert _learn(task, folder / "out") == found


def test_the_systems_are_what_was_learned(learned: Any) -> None:
    """What they make of the states is what the probe was given, in members' order or together but for a factor."""
    folder, task, found = learned
    store = EmbeddingStore(folder / "out" / "embeddings" / "two-tiny-random-states" / "task")
    tokens = Fuser(store, ENSEMBLE).tokens(list(store.iterate_states()))  # [n, 5, 32]
    train = {task.clip_id(split, file) for split in task.folds[0].train for file in task.clips[split]}
    rows = [i for i, name in enumerate(store.ids) if name in train]
    assert 0 < len(rows) < len(tokens)
    sizes = np.sqrt(np.square(tokens[rows]).mean((0, 2), dtype=np.float64))
    own = np.append(np.sqrt(np.square(sizes[:4]).mean()) / sizes[:4], 1)  # a member keeps its size
    layers, joint = (np.asarray(found.results[i].weights) * scales for i, scales in ((1, own), (2, 1 / sizes)))
    apart = read_system(Path(found.systems["layers"]))
    assert (apart.combination, apart.members[1].layers) == ("interleave", "last")
    scenes = fuse_scenes(store, apart)  # interleaved: every second number is of one member
    assert relative(scenes[:, 0::2], np.einsum("nkd,k->nd", tokens[:, :4], layers[:4])) < FUSED_BOUND
    assert relative(scenes[:, 1::2], tokens[:, 4]) < FUSED_BOUND
    together = read_system(Path(found.systems["joint"]))
    assert together.combination == "average"
    wanted = np.einsum("nkd,k->nd", tokens, joint) / joint[4] / 2  # CREPE's weight is one, the mean is over two members
    assert relative(fuse_scenes(store, together), wanted) < FUSED_BOUND


def test_an_average_of_learned_layers(learned: Any) -> None:
    """What the probe was given is what the system makes."""
    folder, task, _ = learned
    store = EmbeddingStore(folder / "out" / "embeddings" / "two-tiny-random-states" / "task")
    average = dataclasses.replace(ENSEMBLE, combination="average")
    study = learning._Study(task, average, store, folder / "out", *find_protocol("fixed"), range(1))
    logits = np.array([0.3, -0.5, 1.0, 0.0], np.float32), np.zeros(1, np.float32)
    given = np.stack(list(study._scaled(study.scales["layers"]).values()))
    mixed = probes.mixed({"averaged": tuple(map(jnp.asarray, logits))}, jnp.asarray(given))
    study.results["layers"] = {"weights": np.concatenate([np.exp(own) / np.exp(own).sum() for own in logits])}
    system = study._weighted("layers")
    assert system is not None
    assert relative(fuse_scenes(store, system), mixed) < FUSED_BOUND


def test_members_are_searched_greedily(learned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many members: the best alone, and with one more as long as that helps."""
    folder, task, _ = learned
    store = EmbeddingStore(folder / "out" / "embeddings" / "two-tiny-random-states" / "task")
    monkeypatch.setattr(learning, "SUBSETS", 0)
    names = ("hubert-base", "a", "b", "c")
    members = tuple(Member("hubert-base", name=name) for name in names)
    study = learning._Study(task, ENSEMBLE, store, folder / "out", *find_protocol("fixed"), range(1))
    study.system = System("many", members)
    values = {"a": 0.5, "a+b": 0.7, "a+c": 0.6, "hubert-base+a": 0.5, "a+b+c": 0.7, "hubert-base+a+b": 0.6}

    def score(own: tuple[Member, ...]) -> None:
        name = learning._subset_name(own)
        study.results[name] = {"validation": [values.get(name, 0.1)], "test": [0.0], "weights": []}

    monkeypatch.setattr(study, "_score_subset", score)
    tried = [learning._subset_name(own) for own in study._search()]
    assert tried == [*names, "hubert-base+a", "a+b", "a+c", "hubert-base+a+b", "a+b+c"]


def test_bad_input(learned: Any, tmp_path: Path) -> None:
    folder, task, _ = learned
    event = read_task(write_task(tmp_path / "event", "event", clips=1))
    with pytest.raises(InputError, match="event: expected a task with scene embeddings"):
        _learn(event, tmp_path / "out")
    store = EmbeddingStore(folder / "out" / "embeddings" / "two-tiny-random-states" / "task")
    sizes = System("x", ENSEMBLE.members)
    with pytest.raises(StoreError, match="one size, found hubert-base 32, crepe-tiny 256: set feature_size"):
        Fuser(store, sizes).tokens(list(store.iterate_states()))
    for system, fault in (
        (System("x", ENSEMBLE.members), "found hubert-base 32, crepe-tiny 256: set feature_size"),
        (System("x", ENSEMBLE.members, feature_size=8, scene_groups=2), "expected scene_groups = 1, found 2"),
        (System("x", (Member("hubert-base", name="joint"),)), "member 'joint': expected a name that a folder can have"),
        (System("x", (Member("hubert-base", name="../x"),)), "member '../x': expected a name that a folder can have"),
    ):
        with pytest.raises(InputError, match=fault):
            _learn(task, tmp_path / "out", system)
    assert not (tmp_path / "out").exists()
    tasks = tmp_path / "tasks"
    write_task(tasks / "onsets", "event", clips=1)
    arguments = ["learn", str(tasks), "-s", "hubert_base", "--weights", "random", "--size", "tiny", "--out"]
    result = CliRunner().invoke(cli.app, [*arguments, str(tmp_path / "o")], catch_exceptions=False)
    assert result.exit_code == 1
    assert "onsets: expected a task with scene embeddings" in result.stderr


def test_a_fold_with_one_class_is_left_out(learned: Any, tmp_path: Path) -> None:
    """Its metric is not defined: what the others say stands, in strict JSON."""
    folder, task, _ = learned
    undefined = {split: {file: ["low"] for file in clips} for split, clips in task.clips.items() if split == "fold02"}
    same = dataclasses.replace(task, metrics=("aucroc",), clips={**task.clips, **undefined})
    shutil.copytree(folder / "out" / "embeddings", tmp_path / "embeddings")
    found = _learn(same, tmp_path)
    assert any(not np.isfinite(value) for value in found.results[0].test)
    assert np.isfinite(learning.finite_mean(found.results[0].test))
    assert "are left out" in learning.as_text(found)
    text = (tmp_path / "task" / learning.LEARNED).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    alone = dataclasses.replace(
        same, clips={split: {file: ["low"] for file in clips} for split, clips in task.clips.items()}
    )
    with pytest.raises(InputError, match="expected a validation split that defines aucroc"):
        _learn(alone, tmp_path)


def test_mixers() -> None:
    """Sums by group, and attention; equal at first, whatever the tokens are."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((4, 5, 6)).astype(np.float32)
    flat = jnp.asarray(tokens.reshape(4, -1))
    weights = [rng.standard_normal(2).astype(np.float32), rng.standard_normal(3).astype(np.float32)]
    shares = [np.exp(w) / np.exp(w).sum() for w in weights]
    found = probes.mixed({"states": tuple(map(jnp.asarray, weights))}, flat)
    parts = tokens[:, :2], tokens[:, 2:]
    wanted = [np.einsum("bkd,k->bd", part, share) for part, share in zip(parts, shares, strict=True)]
    assert relative(found, np.concatenate(wanted, axis=1)) < FUSED_BOUND
    query = rng.standard_normal((2, 3)).astype(np.float32)
    heads = []
    for h in range(2):
        own = tokens[:, :, 3 * h : 3 * h + 3]
        scores = np.exp(own @ query[h] / np.sqrt(3))
        heads.append(np.einsum("bnd,bn->bd", own, scores / scores.sum(1, keepdims=True)))
    assert relative(probes.mixed({"query": jnp.asarray(query)}, flat), np.concatenate(heads, axis=1)) < FUSED_BOUND
    point = Point(1, 8, 0.0, 1e-2, "xavier_uniform", 4, 1, 1, 1)
    halves = probes.mixed({"averaged": tuple(map(jnp.asarray, weights))}, flat)
    assert relative(halves, sum(wanted) / 2) < FUSED_BOUND
    for mixer in (Mixer((2, 3)), Mixer((5,)), Mixer((2, 3), averaged=True), Mixer((5,), heads=2)):
        fresh = probes.init(jax.random.key(0), point, 30, 3, mixer)
        assert len(fresh.params["hidden"][0]["weight"]) == mixer.features(6)
        means = [part.mean(1) for part in parts] if mixer.groups == (2, 3) else [tokens.mean(1)]
        means = [sum(means) / 2] if mixer.averaged else means
        assert relative(probes.mixed(fresh.params, flat), np.concatenate(means, axis=1)) < FUSED_BOUND
        gradient = jax.grad(lambda p, rest=fresh: probes.logits(rest._replace(params=p), flat).sum())(fresh.params)
        learned = gradient["query"] if mixer.heads else probes.group_logits(gradient)[0]
        assert float(jnp.abs(learned).max()) > 0


def test_statistics() -> None:
    """Of independent scores (no share is tested) it is the paired t-test; overlap makes it more careful."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.7, 0.1, 12).tolist(), rng.normal(0.6, 0.1, 12).tolist()
    plain, careful = compare(ours, theirs, 0.0), compare(ours, theirs, 0.2)
    reference: Any = stats.ttest_rel(ours, theirs)
    assert plain.p == pytest.approx(reference.pvalue)
    interval = reference.confidence_interval(0.95)
    assert (plain.low, plain.high) == pytest.approx((interval.low, interval.high))
    assert careful.mean == plain.mean
    assert careful.p is not None
    assert careful.p > reference.pvalue
    assert compare([0.5], [0.25], 0.2) == (0.25, None, None, None)
    assert compare([0.5, 0.5], [0.25, 0.25], 0.2) == (0.25, None, None, None)
    assert compare([0.5, float("nan")], [0.25, 0.1], 0.2) == (0.25, None, None, None)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_a_system_is_written_as_it_is_read(tmp_path: Path) -> None:
    members = (
        Member("hubert-base", (0.5, -0.25, 1e-7, 2.0)),
        Member("ast", scene="pooled", name='odd "name"', normalise=False),
        Member("wavlm-base", (1, -1), weights="random"),
    )
    system = System("näme", members, "concatenate", 512, sample_rate=16_000)
    write_system(system, tmp_path / "s.toml")
    assert read_system(tmp_path / "s.toml") == system
