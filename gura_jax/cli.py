"""The command line: ``gura-jax``."""

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import math
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from gura_jax import __version__, checkpoint
from gura_jax.audio import MAX_SECONDS
from gura_jax.errors import CheckpointError, DownloadError, GuraError, InputError, SystemConfigError
from gura_jax.fusion import Keep
from gura_jax.loading import load_model, outline
from gura_jax.model import Model
from gura_jax.models.families import ENCODERS, find_preset, import_families
from gura_jax.objects import SCHEMES
from gura_jax.parallel import cache_compilations
from gura_jax.systems import SYSTEMS, System, find_system, group_of

EXIT_FAILED = 1  # nothing, or not what was asked for, was done
EXIT_SOME_INPUTS_FAILED = 3
EXIT_NO_DOWNLOAD = 4  # weights are not here, and could not be fetched
EXIT_INTERRUPTED = 130
FAILURES_SHOWN = 20

app = typer.Typer(
    help="The fused audio embeddings of NTU-GURA (HEAR 2021) in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SystemOption = Annotated[
    str, typer.Option("--system", "-s", help="A name from 'gura-jax systems', or a TOML or YAML file.")
]
WeightsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="pretrained (from the checkpoint folder) or random, for all members; or MEMBER=pretrained, "
        "MEMBER=random or MEMBER=FOLDER (a checkpoint, or Hugging Face's), for one; repeatable.",
        show_default="pretrained",
    ),
]
TARGETS = "tpu:NAME:TOPOLOGY such as tpu:v5e:2x2, gpu:NAME such as gpu:h100, or cpu; they need not be here"
AllowOutsideOption = Annotated[
    bool, typer.Option("--allow-outside", help="Allow paths and links that lead out of the root or folder.")
]
SizeOption = Annotated[Literal["tiny"] | None, typer.Option(help="tiny: small speech encoders with random weights.")]


def main() -> None:
    """Run the command line; errors that gura_jax raises on purpose become one message, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be Unicode
    cache_compilations()
    try:
        import_families()
        app()
    except GuraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_NO_DOWNLOAD if isinstance(error, DownloadError) else EXIT_FAILED)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _parse_weights(values: Sequence[str] | None) -> Any:
    """What ``load_model`` takes as weights."""
    if not values:
        return "pretrained"
    if len(values) == 1 and "=" not in values[0]:
        return values[0]
    parsed = dict(value.split("=", 1) for value in values if "=" in value)
    if len(parsed) < len(values):
        raise SystemConfigError(
            f"--weights: expected one of pretrained and random, or MEMBER=... for each, found {' '.join(values)}"
        )
    return parsed


@app.command()
def systems(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WORD",
            help="Only those with all these words in their name, group, members or a member's licence: whisper, music.",
        ),
    ] = None,
    converted: Annotated[bool, typer.Option("--converted", help="Only those whose checkpoints are all there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the systems: their sizes and members, and the checkpoints that they need."""
    rows = [row for row in map(_system_row, SYSTEMS.values()) if _wanted(row, words or [], converted)]
    if not rows:
        sought = " and ".join([*(words or []), *(["all its checkpoints"] if converted else [])])
        raise SystemConfigError(
            f"no system has {sought}: 'gura-jax systems' shows all, and 'gura-jax convert NAME' fills "
            f"{checkpoint.checkpoint_folder()}"
        )
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    width = max(len(row["name"]) for row in rows)
    for group, own in itertools.groupby(rows, key=lambda row: row["group"]):
        print(f"\n{group}\n  {'system':{width}} {'kHz':>4} {'frame':>5} {'scene':>5} {'weights':>8}  members")
        for row in own:
            members = f" {row['combination']} ".join(map(_member_text, row["members"]))
            size = f"{row['parameters'] / 1e6:.0f} M" if row["parameters"] else ""
            rate = f"{row['sample_rate'] / 1000:g}"
            print(f"  {row['name']:{width}} {rate:>4} {row['frame_size']:5} {row['scene_size']:5} {size:>8}  {members}")
    print(f"\ncheckpoints in {checkpoint.checkpoint_folder()}:")
    named = {member["encoder"]: member for row in rows for member in row["members"] if member["encoder"] in ENCODERS}
    others = {} if words or converted else {name: {"licence": find_preset(name).licence} for name in ENCODERS}
    for name, member in (others | named).items():
        source = find_preset(name).source
        state = (
            "converted"
            if _have(name)
            else f"run: gura-jax convert {name}"
            if source
            else "convert a file: docs/encoders.md"
        )
        print(f"  {name:24} {state:44} {member['licence'] or 'licence not stated'}")


def _wanted(row: Mapping[str, Any], words: Sequence[str], converted: bool) -> bool:
    members = row["members"]
    told = [f"{_member_text(member)} {member['licence']}" for member in members]
    text = " ".join([row["name"], row["group"], *told]).lower()
    return all(word.lower() in text for word in words) and (not converted or all(m["converted"] for m in members))


def _member_text(member: Mapping[str, Any]) -> str:
    """Name, and what is not the default."""
    told = [str(member["layers"])] if member["layers"] not in ("last", None) else []
    told += ["pooled scenes"] if member["scene"] == "pooled" else []
    return member["encoder"] + (f" ({', '.join(told)})" if told else "")


def _have(encoder: str) -> bool:
    return (checkpoint.checkpoint_folder() / encoder / checkpoint.MANIFEST).is_file()


def _system_row(system: System) -> dict[str, Any]:
    model = outline(system)
    members = []
    for member, built in zip(system.members, model.fusion.members, strict=True):
        named = isinstance(member.encoder, str)
        weights = built.encoder.abstract_params().values()
        members.append(
            {
                "encoder": member.encoder if named else type(member.encoder).__qualname__,
                "layers": member.layers if built.encoder.num_states else None,
                "scene": member.scene,
                "normalise": built.options.normalise,
                "sample_rate": built.encoder.sample_rate,
                "parameters": sum(math.prod(array.shape) for array in weights),
                "licence": find_preset(str(member.encoder)).licence if member.encoder in ENCODERS else "",
                "converted": _have(str(member.encoder)) if named else None,
            }
        )
    return {
        "name": system.name,
        "group": group_of(system.name),
        "members": members,
        "combination": system.combination,
        "sample_rate": model.sample_rate,
        "frame_size": model.timestamp_embedding_size,
        "scene_size": model.scene_embedding_size,
        "parameters": sum(member["parameters"] for member in members),
    }


@app.command()
def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME|SYSTEM|HUB_ID|PATH...",
            help="An encoder or a system of 'gura-jax systems', a Hugging Face hub id, or a folder or file of "
            "PyTorch weights (Hugging Face, fairseq, torchaudio, or an encoder's own authors').",
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the checkpoint; by default the encoder's or the source's.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="For files that do not say what they are (torchaudio's): the encoder's name.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Of MMS: the language whose adapters to take, such as fra.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Checkpoint folder.", show_default="$GURA_JAX_CHECKPOINTS, ...")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace checkpoints that exist.")] = False,
) -> None:
    """Convert PyTorch weights to checkpoints."""
    jobs = [(job_name, spec) for source in sources for job_name, spec in _conversions(source)]
    if language is not None:
        jobs = [(f"{job_name}-{language}", spec) for job_name, spec in jobs]
    if name is not None:
        if len(jobs) != 1:
            raise CheckpointError(f"--name: expected one source, found {len(jobs)}")
        jobs = [(name, jobs[0][1])]
    folder = out or checkpoint.checkpoint_folder()
    for job_name, spec in dict(jobs).items():
        if len({other for other_name, other in jobs if other_name == job_name}) > 1:
            raise CheckpointError(f"several sources would become the checkpoint {job_name}: convert them one by one")
        if Path(job_name).name != job_name or job_name.startswith("."):
            raise CheckpointError(f"checkpoint name: expected a plain name, found {job_name!r}")
        path = folder / job_name
        if path.exists() and not overwrite:
            checkpoint.read_manifest(path)  # raises where there is but half a checkpoint
            print(f"{job_name}: {path} exists already; --overwrite converts it again")
            continue
        start = time.perf_counter()
        print(f"{job_name}: converting {spec}", flush=True)
        converted = _convert_one(spec, job_name, architecture, language)
        if job_name in ENCODERS and find_preset(job_name).source == spec:
            print(f"{job_name}: licence of the weights: {find_preset(job_name).licence or 'not known'}")
        checkpoint.save(path, converted.params, converted.manifest, overwrite=overwrite)
        size = sum(array.nbytes for array in converted.params.values()) / 1e6
        print(
            f"{job_name}: {len(converted.params)} arrays, {size:.0f} MB, from {converted.manifest.source}, "
            f"in {time.perf_counter() - start:.1f} s -> {path}"
        )


def _conversions(source: str) -> Iterator[tuple[str, str]]:
    """(checkpoint name, what to convert) of each encoder that an argument stands for."""
    if source in ENCODERS:
        spec = find_preset(source).source
        if spec is None:
            raise CheckpointError(
                f"no weights of {source} can be fetched: expected a file of them, if they are published "
                f"(gura-jax convert FILE --architecture {source} --name {source})"
            )
        yield source, spec
    elif source in SYSTEMS:
        for member in SYSTEMS[source].members:
            if isinstance(member.encoder, str):
                yield from _conversions(member.encoder)
            else:
                print(f"note: member {member.name} is a Python object: nothing to convert", file=sys.stderr)
    else:
        registered = [name for name in ENCODERS if find_preset(name).source == source]
        path = Path(source)
        own = (path.resolve().name if path.is_dir() else path.stem) if path.exists() else source.replace("/", "--")
        yield (registered[0] if registered else own.replace(":", "-")), source


def _convert_one(spec: str, name: str, architecture: str | None, language: str | None) -> Any:
    from gura_jax.convert import convert

    converted = convert(spec, architecture=architecture, language=language)
    if name in ENCODERS:
        checkpoint.check_architecture(
            name, find_preset(name).config, converted.manifest.architecture, converted.manifest.source
        )
        manifest = dataclasses.replace(converted.manifest, normalise=find_preset(name).normalise)
        converted = converted._replace(manifest=manifest)
    return converted


def _parse_states(states: Literal["mean", "frames"] | None, layers: str | None) -> Keep | None:
    if states is None:
        if layers is not None:
            raise InputError("--layers chooses hidden states: expected --states mean or --states frames with it")
        return None
    if layers is None:
        if states == "frames":
            raise InputError("--states frames: expected --layers, such as 6,12, as the frames of all states are large")
        return Keep(states)
    try:
        return Keep(states, tuple(map(int, layers.split(","))))
    except ValueError:
        raise InputError(f"--layers: expected integers such as 0,6,-1, found {layers!r}") from None


@app.command()
def embed(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Audio files, folders of them, glob patterns, manifests (CSV, JSON Lines or Parquet with the columns "
            "id and path, perhaps offset and duration in seconds, and any others), tar archives, Parquet tables with a "
            "column of audio, folders of HEAR tasks. Also URLs: s3://, gs://, az://, hf://datasets/, https://.",
        ),
    ],
    system: SystemOption,
    out: Annotated[
        str, typer.Option(metavar="PLACE", help="Folder, or s3://, gs:// or az:// URL, to write to or to go on in.")
    ],
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Write timestamp embeddings (frames) too.")] = False,
    weights: WeightsOption = None,
    size: SizeOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete embeddings that are there.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try the clips again that failed.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of the finished shards again; else their sizes are compared.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, and do nothing.")] = False,
    root: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="What a manifest's paths are relative to.", show_default="its folder"),
    ] = None,
    allow_outside: AllowOutsideOption = False,
    window: Annotated[
        float | None, typer.Option(help="Cut longer clips into windows of so many seconds, each with its own row.")
    ] = None,
    max_duration: Annotated[
        float, typer.Option(help="Refuse clips of more seconds (with --window, after they are cut).")
    ] = MAX_SECONDS,
    storage: Annotated[Literal["float32", "float16"], typer.Option(help="Of the numbers on disk.")] = "float32",
    form: Annotated[
        Literal["npy", "parquet"],
        typer.Option("--format", help="Of the store; parquet: embeddings and metadata in one table."),
    ] = "npy",
    states: Annotated[
        Literal["mean", "frames"] | None,
        typer.Option(
            help="Write every hidden state of every member too: mean, averaged over time; frames, those of --layers. "
            "'gura-jax fuse' makes other systems of them."
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="With --states, the hidden states to write, such as 0,6,-1; 0: the input.")
    ] = None,
    shard_hours: Annotated[
        float, typer.Option(help="Hours of audio in a shard at most: what is lost when a job is killed.")
    ] = 1.0,
    batch_seconds: Annotated[
        float | None, typer.Option(help="Seconds of audio computed at once.", show_default="to suit the devices")
    ] = None,
    num_shards: Annotated[
        int | None,
        typer.Option(help="Processes that share the work.", show_default="from jax.distributed or Slurm, else 1"),
    ] = None,
    shard_index: Annotated[int | None, typer.Option(help="Which of them this is, from 0.")] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="ray: on all hosts of a Ray cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster.", show_default="RAY_ADDRESS, else this machine")
    ] = None,
    parallel: Annotated[Literal["jit", "pmap"], typer.Option(help="How to use several devices.")] = "jit",
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of convolutions and matrix products.")
    ] = "float32",
    precision: Annotated[
        Literal["highest", "default"], typer.Option(help="Of float32 products; default: TF32 or bfloat16 inside.")
    ] = "highest",
    target: Annotated[
        str | None, typer.Option(help=f"With --dry-run, plan for these devices, and say their hours: {TARGETS}.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Name the batch shapes that are compiled.")] = False,
) -> None:
    """Embed a collection: a scene embedding a clip, and frames with --timestamps.

    Run again with the same arguments, it goes on where it stopped. Exit code 3: some clips failed.
    """
    if verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("gura_jax").setLevel(logging.INFO)
    from gura_jax.dataset import ray_engine, workers
    from gura_jax.dataset.run import open_run
    from gura_jax.dataset.sources import Inputs
    from gura_jax.dataset.table import Settings

    described = find_system(system)
    keep = _parse_states(states, layers)
    settings = Settings(timestamps, storage, window, max_duration, shard_hours, batch_seconds, form, keep)
    arguments: dict[str, Any] = {
        "system": described,
        "weights": _parse_weights(weights),
        "size": size,
        "parallel_by": parallel,
        "dtype": dtype,
        "precision": precision,
    }
    if engine == "ray" and (num_shards is not None or shard_index is not None):
        raise InputError("--engine ray hands out the shards by itself: --num-shards and --shard-index are of no use")
    worker = workers.this_worker(shard_index, num_shards)
    if worker.total > 1 and engine == "local" and (overwrite or retry_failed):
        raise InputError(
            f"--overwrite and --retry-failed are for one process, found {worker.total} (by {worker.found}): "
            "run it alone, or with --engine ray"
        )
    if target is not None and not dry_run:
        raise InputError("--target plans for devices that need not be here: expected --dry-run with it")
    program = _program(described, target, size, dtype, timestamps) if target is not None else None
    sizes = program.model if program is not None else outline(described, size=size)
    clips = Inputs(inputs, sample_rate=sizes.sample_rate, root=root, allow_outside=allow_outside)
    given = clips.shortest  # before a model is loaded
    if dry_run:
        _print_plan(sizes, clips.table, settings, program)
        return
    kept = f"the shards that were finished are safe in {out}; run the same command again (without --overwrite) to go on"
    with _interruptible(kept):
        if engine == "ray":
            summary = ray_engine.work_with_ray(
                arguments,
                given,
                out,
                settings,
                address=address,
                overwrite=overwrite,
                retry_failed=retry_failed,
                verify=verify,
            )
        else:
            model = load_model(**arguments)
            if model.random_members:
                names = ", ".join(model.random_members)
                print(f"note: random weights for {names}: what they contribute means nothing", file=sys.stderr)
            run = open_run(model, given, out, settings, overwrite=overwrite, retry_failed=retry_failed)
            summary = workers.work(run, worker, verify=verify)
    _print_summary(summary, out, worker)
    if summary.failed:
        raise typer.Exit(EXIT_SOME_INPUTS_FAILED)


@contextlib.contextmanager
def _interruptible(kept: str) -> Iterator[None]:
    """End a run at a scheduler's SIGTERM as at Ctrl-C: say what is kept, and exit with a code of its own."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(128 + number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as interruption:
        print(f"interrupted: {kept}", file=sys.stderr)
        raise typer.Exit(interruption.args[0] if interruption.args else EXIT_INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_plan(model: Model, clips: Any, settings: Any, program: Any = None) -> None:
    from gura_jax.dataset.table import plan_table, summarise

    table = plan_table(model, clips, settings)
    plan = summarise(model, settings, table)
    print(
        f"clips      {plan.clips}, of which {plan.unreadable} cannot be read\n"
        f"audio      {plan.hours:.2f} hours\n"
        f"buckets    {len(plan.buckets)}: {', '.join(f'{seconds:.2f}' for seconds in plan.buckets)} s\n"
        f"batches    {plan.batches}\n"
        f"padding    {100 * plan.padding:.1f} % of what is computed\n"
        f"shards     {plan.shards}\n"
        f"output     {plan.bytes / 1e6:.1f} MB"
    )
    if program is not None:
        from gura_jax.compiling import device_hours

        hours = device_hours(program, table)
        bound = "an unknown number of" if hours is None else f"at least {hours:.3g}"
        print(f"device     {bound} hours of {program.target.name}, all its devices together")
    for row in table.filter(table["problem"].is_valid()).select(["path", "problem"]).to_pylist():
        print(f"  {row['path']}: {row['problem']}", file=sys.stderr)


def _program(
    system: System,
    target: str,
    size: Literal["tiny"] | None,
    dtype: Literal["float32", "bfloat16"],
    timestamps: bool,
    *,
    sharded: bool = False,
    gradient: bool = False,
) -> Any:
    """A system's function for devices that need not be here; this process uses none but the CPU."""
    import jax

    from gura_jax.compiling import Program
    from gura_jax.targets import parse_target

    jax.config.update("jax_platforms", "cpu")
    devices = parse_target(target)
    shard = "fsdp" if sharded else None
    remat = "layers" if gradient else None
    model = outline(system, size=size, dtype=dtype, devices=devices.devices(), shard=shard, remat=remat)
    return Program(model, devices, frozenset({"frames", "scenes"} if timestamps else {"scenes"}), gradient)


@app.command(name="compile")
def compile_for(
    system: Annotated[str, typer.Argument(help="A name from 'gura-jax systems', or a TOML or YAML file.")],
    target: Annotated[str, typer.Option(help=f"The devices: {TARGETS}.")],
    clips: Annotated[int, typer.Option(help="On each device.", min=1)] = 16,
    seconds: Annotated[float, typer.Option(help="Of each clip.")] = 10.0,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of convolutions and matrix products.")
    ] = "float32",
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Frames too, as embed --timestamps.")] = False,
    weights: Annotated[
        Literal["whole", "sharded"], typer.Option(help="A copy on each device, or divided among them (fsdp).")
    ] = "whole",
    gradient: Annotated[
        bool,
        typer.Option(
            "--gradient", help="Of the results' mean square by all weights, with recomputation, in their place."
        ),
    ] = False,
    size: SizeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile what embed would run, for devices that need not be here: its memory, work and least time there.

    Exit code 1: it does not fit into their memory.
    """
    from gura_jax.compiling import compile_report, describe

    program = _program(
        find_system(system), target, size, dtype, timestamps, sharded=weights == "sharded", gradient=gradient
    )
    report = compile_report(program, clips, seconds)
    print(json.dumps(report.as_json(), indent=1) if as_json else describe(report))
    if report.most_clips is not None:
        raise typer.Exit(EXIT_FAILED)


def _print_summary(summary: Any, out: str, worker: Any) -> None:
    done = summary.done
    print(
        f"{done.clips} clips, {summary.seconds:.1f} s of audio ({summary.rates['clips_per_second']:.1f} "
        f"clips/s, {summary.rates['audio_hours_per_hour']:.0f} h of audio/h) -> {out}"
    )
    if summary.before:
        print(f"{summary.before} of {summary.shards} shards were there already")
    if worker.total > 1:
        print(f"this was process {worker.number} of {worker.total} (by {worker.found})")
    if summary.left:
        print(f"{summary.left} shards of the run are not finished: other processes have them, or will")
    if summary.failed:
        print(
            f"{len(summary.failed)} clips failed; see {out.rstrip('/')}/failed.csv, or --retry-failed:", file=sys.stderr
        )
        for failure in summary.failed[:FAILURES_SHOWN]:
            print(f"  {failure.path}: {failure.reason}", file=sys.stderr)
        if len(summary.failed) > FAILURES_SHOWN:
            print(f"  and {len(summary.failed) - FAILURES_SHOWN} more", file=sys.stderr)


@app.command()
def evaluate(
    tasks: Annotated[Path, typer.Argument(metavar="TASKS_DIR", help="Folder of HEAR tasks, or one task.")],
    out: Annotated[Path, typer.Option(help="Folder for embeddings, scores and tables; or to go on in.")],
    systems: Annotated[
        str | None,
        typer.Option(
            "--systems", "--system", "-s", help="Names from 'gura-jax systems', or TOML or YAML files: A,B,C."
        ),
    ] = None,
    module: Annotated[
        list[str] | None, typer.Option(help="A module with HEAR's common API, by its import name (repeatable).")
    ] = None,
    weights: WeightsOption = None,
    size: SizeOption = None,
    learn_layers: Annotated[
        bool,
        typer.Option(
            "--learn-layers",
            help="For each system that averages the layers of one encoder, also a row with learned layer weights.",
        ),
    ] = False,
    protocol: Annotated[
        str, typer.Option(help="hear2021: reproduces the bugs of HEAR's kit; fixed: without them.")
    ] = "hear2021",
    seed: Annotated[int, typer.Option(help="Of the probes.", min=0)] = 0,
) -> None:
    """Evaluate systems on HEAR tasks, and compare them: embed, train probes, test, and write tables and a page.

    Run again with the same arguments, it goes on where it stopped. Exit code 3: something failed, the rest is done.
    """
    from gura_jax.evaluate import page, report, run, tables
    from gura_jax.evaluate.benchmarks import find_protocol

    benchmark, chosen = find_protocol(protocol)
    sources = _sources(systems, module or [], weights or [], size, learn_layers)
    with _interruptible(f"run the same command again to go on in {out}"):
        outcome = run.evaluate(tasks, sources, out, benchmark, chosen, seed)
    if outcome.rows:
        everything = [row for row in report.read_table(out) if (row.protocol, row.seed) == (protocol, seed)]
        name = f"tables-{protocol}-{seed}"
        compared = tables.compare(everything, benchmark.comparisons, benchmark.published)
        paths = tables.write(out, name, compared)
        paths.append(page.write_evaluation(out, benchmark, chosen, seed, compared, outcome.failed))
        print(f"protocol {protocol}, seed {seed}\n\n{tables.terminal(compared)}\n")
        print(f"-> {', '.join(map(str, [out / report.TABLE, *paths]))}")
    if outcome.failed:
        print(f"{len(outcome.failed)} failed: {', '.join(outcome.failed)}", file=sys.stderr)
        raise typer.Exit(EXIT_SOME_INPUTS_FAILED if outcome.rows else EXIT_FAILED)


@app.command()
def learn(
    tasks: Annotated[Path, typer.Argument(help="Folder of HEAR tasks, or of one; those with scene embeddings.")],
    system: SystemOption,
    out: Annotated[Path, typer.Option(help="Folder for embeddings, scores and systems, or to go on in.")],
    weights: WeightsOption = None,
    size: SizeOption = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds of the probes.", min=1)] = 5,
    protocol: Annotated[str, typer.Option(help="Of the probes: fixed, or hear2021, with the bugs of HEAR's kit.")] = (
        "fixed"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Learn which layers and members of a system serve a task, and write the system; embeds once.

    Run again with the same arguments, it goes on where it stopped. Exit code 3: a task failed, the rest is done.
    """
    from gura_jax.evaluate import learn as learning
    from gura_jax.evaluate import learned_page, metrics
    from gura_jax.evaluate.benchmarks import find_protocol
    from gura_jax.evaluate.embed import SystemEmbeddings

    metrics.check_installed()
    benchmark, chosen = find_protocol(protocol)
    source = SystemEmbeddings(find_system(system), _parse_weights(weights), size)
    source.check()
    if source.random_members:
        names = ", ".join(source.random_members)
        print(f"note: random weights for {names}: what they contribute means nothing", file=sys.stderr)
    found, failed = [], []
    with _interruptible(f"run the same command again to go on in {out}"):
        for folder in benchmark.find_tasks(tasks):
            try:
                task = benchmark.read_task(folder)
                found.append(learning.learn(task, source, out, benchmark, chosen, range(seeds)))
                path = learned_page.write_learned(found[-1], source.name, out, benchmark, chosen, range(seeds))
            except GuraError as error:
                failed.append(folder.name)
                print(f"{folder.name}: {error}", file=sys.stderr)
                continue
            print(f"-> {path}", file=sys.stderr)
            if not as_json:
                print(f"{learning.as_text(found[-1])}\n", flush=True)
    if as_json:
        print(json.dumps([learning.as_json(each) for each in found], indent=1))
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(EXIT_SOME_INPUTS_FAILED if found else EXIT_FAILED)


def _sources(
    systems: str | None, modules: list[str], weights: list[str], size: Literal["tiny"] | None, learn_layers: bool
) -> list[Any]:
    """Where the embeddings of an evaluation come from."""
    from gura_jax.evaluate.embed import SystemEmbeddings
    from gura_jax.evaluate.modules import ModuleEmbeddings

    names = [name for name in (systems or "").split(",") if name]
    if not names and not modules:
        raise InputError("expected --systems or --module, found neither")
    if not names:
        if size is not None or len(weights) > 1 or (weights and len(modules) > 1):
            raise InputError("--module takes no --size, and one --weights, the model file that its load_model gets")
        return [ModuleEmbeddings(name, weights[0] if weights else None) for name in modules]
    chosen, described = _parse_weights(weights), [find_system(name) for name in names]
    members = {member.name for system in described for member in system.members}
    if isinstance(chosen, dict) and (unknown := sorted(set(chosen) - members)):
        raise SystemConfigError(f"--weights: expected members of {', '.join(names)}, found {', '.join(unknown)}")
    found: list[Any] = []
    for system in described:
        own = {member.name for member in system.members}
        some = {k: v for k, v in chosen.items() if k in own} if isinstance(chosen, dict) else chosen
        source = SystemEmbeddings(system, some or "pretrained", size)
        found.append(source)
        if learn_layers and source.averages_layers:
            found.append(dataclasses.replace(source, learned=True))
    if random := sorted({name for source in found for name in source.random_members}):
        print(f"note: random weights for {', '.join(random)}: what they contribute means nothing", file=sys.stderr)
    return found + [ModuleEmbeddings(name) for name in modules]


@app.command()
def mteb(
    system: Annotated[
        str | None, typer.Argument(help="A name from 'gura-jax systems', or a TOML or YAML file.", show_default=False)
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option("--benchmark", help="All tasks of a benchmark of MTEB's, as 'MAEB(audio-only)'.")
    ] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Instead: names of MTEB's tasks, A,B,C.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for MTEB's files of scores; or to go on in.")] = None,
    weights: WeightsOption = None,
    size: SizeOption = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of convolutions and matrix products.")
    ] = "float32",
    list_tasks: Annotated[
        bool, typer.Option("--list", help="List the tasks (of the benchmark, else all of audio), and run nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a system on MTEB's audio tasks (MAEB), by MTEB's own code.

    Run again with the same arguments, it goes on where it stopped. Exit code 3: some tasks failed, the rest is done.
    """
    from gura_jax.evaluate import mteb as runs
    from gura_jax.mteb import load

    names = [name for name in (tasks or "").split(",") if name]
    if list_tasks:
        listed = runs.find_tasks(benchmark, names) if benchmark or names else runs.audio_tasks()
        rows = [runs.describe_task(task) for task in listed]
        if as_json:
            print(json.dumps({"tasks": rows, "benchmarks": runs.audio_benchmarks()}, indent=1))
            return
        for row in rows:
            print(f"{row['type']:28} {row['task']:44} {row['metric']:14} {row['languages']:4} languages")
        print(f"\nbenchmarks of audio alone: {'; '.join(runs.audio_benchmarks())}")
        return
    if system is None or out is None:
        raise InputError("expected SYSTEM and --out, or --list")
    chosen = runs.find_tasks(benchmark, names)
    encoder = load(system, weights=_parse_weights(weights), size=size, dtype=dtype)
    if encoder.model.random_members:
        random = ", ".join(encoder.model.random_members)
        print(f"note: random weights for {random}: what they contribute means nothing", file=sys.stderr)
    with _interruptible(f"tasks that were finished are safe in {out}; run the same command again to go on"):
        outcome = runs.run(encoder, chosen, out, show_progress_bar=True)
    if as_json:
        print(json.dumps(outcome.as_json(), indent=1))
    else:
        for score in outcome.scores:
            print(f"{score.task:44} {score.metric:14} {score.score:.4f}")
        if len(outcome.scores) > 1:
            print(f"{'mean':59} {outcome.mean:.4f}")
        print(f"{len(outcome.scores)} of {len(chosen)} tasks -> {outcome.folder}")
    if outcome.failed:
        print(f"{len(outcome.failed)} failed: {', '.join(outcome.failed)}", file=sys.stderr)
        raise typer.Exit(EXIT_SOME_INPUTS_FAILED if outcome.scores else EXIT_FAILED)


@app.command()
def plot(
    stores: Annotated[list[str], typer.Argument(metavar="STORE...", help="Places that embed or evaluate wrote to.")],
    out: Annotated[list[Path], typer.Option(help="FIGURE.png, .svg or .pdf, or PAGE.html, which plays (repeatable).")],
    color: Annotated[
        str, typer.Option(help="A column of the metadata, or 'data set': the store, or the HEAR task.")
    ] = "data set",
    inputs: Annotated[
        list[Path] | None,
        typer.Option(help="What was embedded, for columns that the stores do not have, as labels (repeatable)."),
    ] = None,
    perplexity: Annotated[float, typer.Option(help="Neighbours that count; the paper's Figure 2 has 50.")] = 50.0,
) -> None:
    """Lay out stored embeddings by t-SNE, as a picture or as a page that plays the clips."""
    from gura_jax import tsne

    for path in out:
        if path.parts and path.parts[0].removesuffix(":") in SCHEMES:
            raise InputError(f"--out: expected a file on this machine, found {path}")
        if path.suffix not in (*tsne.PICTURES, tsne.PAGE):
            raise InputError(f"--out: expected {', '.join(tsne.PICTURES)} or {tsne.PAGE}, found {path}")
    clips = tsne.read_clips(stores, inputs=inputs or ())
    colors = tsne.color_by(clips, color)
    found = tsne.make_map(clips, perplexity)
    if found.perplexity < perplexity:
        print(f"note: perplexity {found.perplexity:g}, as there are {len(clips.table)} clips", file=sys.stderr)
    for path in out:
        if path.suffix == tsne.PAGE:
            plays = tsne.write_page(found, colors, path)
            print(f"{len(clips.table)} clips, {plays} of them play -> {path}")
        else:
            tsne.draw(found, colors, path)
            print(f"{len(clips.table)} clips -> {path}")


@app.command()
def export(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Folder or URL that embed wrote to.")],
    out: Annotated[
        str,
        typer.Option(
            metavar="PLACE",
            help="Folder to write to, new or empty; for npy and parquet also an s3:// or gs:// URL, or a copy to go on "
            "with.",
        ),
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="npy, parquet: a copy in that format of the store, which embed resumes; datasets: Parquet for Hugging "
            "Face datasets; hear: .npy as HEAR's kit has them; hoplite: perch-hoplite's database.",
        ),
    ],
    timestamps: Annotated[
        bool,
        typer.Option(
            "--timestamps",
            help="Frames: beside the scenes (datasets), or in their place (hear, hoplite); npy and parquet copy them "
            "anyway.",
        ),
    ] = False,
) -> None:
    """Copy stored embeddings to another format or place, or write them for other tools."""
    from gura_jax.dataset.export import export as export_store
    from gura_jax.dataset.reader import EmbeddingStore
    from gura_jax.dataset.sinks import SINKS

    with _interruptible(f"run the same command again; {' and '.join(SINKS)} go on where they stopped"):
        print(f"{export_store(EmbeddingStore(store), out, form, timestamps=timestamps)} clips -> {out}")


@app.command()
def fuse(
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="Folder or URL that embed --states mean (or frames) wrote to.")
    ],
    system: Annotated[
        str,
        typer.Option(
            "--system",
            "-s",
            help="A name from 'gura-jax systems', or a TOML or YAML file; of encoders that the store has.",
        ),
    ],
    out: Annotated[str, typer.Option(metavar="PLACE", help="Folder or URL to write to, or to go on in.")],
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="Write frames too, of a store with frames of hidden states.")
    ] = False,
) -> None:
    """Embed a collection by another system from stored hidden states: other layers, weights or members, no encoder."""
    from gura_jax.dataset.fused import fuse_store
    from gura_jax.dataset.reader import EmbeddingStore

    with _interruptible("run the same command again to go on"):
        fused = fuse_store(EmbeddingStore(store), system, out, timestamps=timestamps)
    if fused.missing:
        print(f"note: {fused.missing} shards of {store} are not finished: fuse again when they are", file=sys.stderr)
    print(f"{fused.clips} clips -> {out}")
    if fused.failed:
        print(f"{fused.failed} clips of {store} have no embedding: see failed.csv", file=sys.stderr)
        raise typer.Exit(EXIT_SOME_INPUTS_FAILED)


@app.command()
def search(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Folder or URL that embed wrote to.")],
    queries: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="QUERY...",
            help="Recordings, embedded by the store's own system; id:ID, clips of the store; FILE.npy, vectors.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="Clips for each query.", min=1)] = 10,
    frames: Annotated[
        bool, typer.Option("--frames", help="Search the frames, and say where in a clip: its best frame.")
    ] = False,
    index: Annotated[
        bool,
        typer.Option(
            "--index", help="Search by an approximate index, which is built, or extended by new shards, where needed."
        ),
    ] = False,
    index_folder: Annotated[
        Path | None, typer.Option(help="Where the index is.", show_default="in STORE; of a bucket, in the cache")
    ] = None,
    duplicates: Annotated[
        float | None,
        typer.Option(metavar="SIMILARITY", help="Instead: pairs of clips at least so similar, such as 0.99."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Pairs of --duplicates at most.", min=1)] = 10_000,
    weights: WeightsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="PAGE.html", help="Write a page that plays the clips.")] = None,
) -> None:
    """Search stored embeddings for the clips most similar to a recording, or for near duplicates.

    Exit code 3: some queries failed, the others are done.
    """
    from gura_jax.dataset.reader import EmbeddingStore
    from gura_jax.search import check_page, results, write_page

    if duplicates is not None and (queries or frames or index):
        raise InputError("--duplicates compares all scenes with each other: expected no queries, --frames or --index")
    if duplicates is None and not queries and not index:
        raise InputError("expected queries, --index to build an index, or --duplicates, found none of them")
    if index_folder is not None and not index:
        raise InputError("--index-folder says where the index is: expected --index too, which searches by it")
    embeddings = EmbeddingStore(store)
    if out is not None:
        check_page(out)
    planned = range(embeddings.run.get("shards", 0))
    if missing := sum(number not in embeddings.records for number in planned):
        print(f"note: {missing} of {len(planned)} shards are not finished, and not searched", file=sys.stderr)
    if duplicates is not None:
        outcome = _duplicates(embeddings, duplicates, limit)
    else:
        outcome = _matches(
            embeddings, queries or [], top, "frames" if frames else "scenes", index, index_folder, weights
        )
    system = embeddings.run["system"]["name"]
    if as_json:
        about = {"store": store, "system": system, "clips": len(embeddings), "missing_shards": missing}
        print(json.dumps(about | outcome.content, indent=1))
    else:
        for line in outcome.lines:
            print(line)
    print(outcome.about, file=sys.stderr)
    if out is not None and (outcome.results or not outcome.failed):
        title = f"{system}: search in {store}"
        plays = write_page(outcome.results, title, outcome.about, Path(store), embeddings.run["sample_rate"], out)
        print(f"{plays} sounds play -> {out}", file=sys.stderr)
    if outcome.failed:
        print(f"{len(outcome.failed)} queries failed:", file=sys.stderr)
        for failure in outcome.failed[:FAILURES_SHOWN]:
            print(f"  {results.visible(str(failure.error))}", file=sys.stderr)
        if len(outcome.failed) > FAILURES_SHOWN:
            print(f"  and {len(outcome.failed) - FAILURES_SHOWN} more", file=sys.stderr)
        raise typer.Exit(EXIT_SOME_INPUTS_FAILED if outcome.results else EXIT_FAILED)


class _Outcome(NamedTuple):
    """Results of a search: for a page, as lines of text, as JSON; what they are; and queries that failed."""

    results: list[Any]
    lines: Iterable[str]
    content: dict[str, Any]
    about: str
    failed: Sequence[Any] = ()


def _duplicates(store: Any, threshold: float, limit: int) -> _Outcome:
    from gura_jax.dataset.search import StoredVectors, duplicates
    from gura_jax.nearest import pair_rows
    from gura_jax.search import results

    with _rows_done("compared", pair_rows(StoredVectors(store))) as report:
        pairs = duplicates(store, threshold, limit=limit, report=report)
    about = f"{len(pairs.ids)} pairs of {len(store)} clips with a similarity of at least {threshold:g}"
    if not pairs.complete:
        about += "; there are more: pass --limit, or a higher similarity"
    found = results.of_duplicates(store, pairs)
    content = {"threshold": threshold, "complete": pairs.complete, "pairs": results.pairs_as_json(found)}
    return _Outcome(found, results.pair_table(found), content, about)


def _matches(
    store: Any,
    queries: list[str],
    top: int,
    of: Literal["scenes", "frames"],
    index: bool,
    index_folder: Path | None,
    weights: list[str] | None,
) -> _Outcome:
    from gura_jax.dataset.search import search as search_all
    from gura_jax.search import Failure, open_index, results, try_queries

    content: dict[str, Any] = {"of": of, "metric": "cosine"}
    graph, how = None, "exact search"
    if index:
        with _interruptible("run the same command again to build the index"), _rows_done("indexed", None) as report:
            graph = open_index(store, index_folder, of=of, report=report)
        recall = graph.recall
        how = f"index of {len(graph)} {of}, recall@{recall.top} {recall.share:.4f} against exact search"
        print(
            f"index: {f'{graph.built} {of} added' if graph.built else 'there already'}, recall@{recall.top} "
            f"{recall.share:.4f} against exact search ({recall.queries} clips as queries) -> {graph.folder}",
            file=sys.stderr,
        )
        content["index"] = {"folder": str(graph.folder), "vectors": len(graph), "recall": recall._asdict()}
    asked, failed = [], []
    for query in try_queries(store, queries, of, _parse_weights(weights)):
        if isinstance(query, Failure):
            failed.append(query)
        else:
            asked.append(query)
    vectors, found = [query.vector for query in asked], []
    if graph is not None and asked:
        found = results.of_matches(store, asked, graph.search(vectors, top))
    elif asked:
        with _rows_done("searched", None) as report:
            found = results.of_matches(store, asked, search_all(store, vectors, top, of=of, report=report))
    content |= {"queries": results.as_json(found), "failed": results.failed_as_json(failed)}
    return _Outcome(found, results.table(found), content, f"{len(asked)} queries, {len(store)} clips, {how}", failed)


@contextlib.contextmanager
def _rows_done(what: str, total: int | None) -> Iterator[Any]:
    """Show on a terminal how many rows are done, where that takes seconds."""
    from tqdm import tqdm

    hidden = None if sys.stderr.isatty() else True
    with tqdm(total=total, desc=what, unit=" rows", unit_scale=True, delay=1, leave=False, disable=hidden) as bar:
        yield bar.update


@app.command()
def parity(
    system: SystemOption,
    weights: WeightsOption = None,
    size: SizeOption = None,
    audio: Annotated[Path | None, typer.Option(help="An audio file.", show_default="a synthetic clip")] = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare with PyTorch, layer by layer and end to end; exit 1 past the bound.

    The clip, and its first 60 %, go through PyTorch one by one, and through gura_jax as one padded batch.
    """
    from gura_jax.audio import load_audio, synthetic_clip
    from gura_jax.convert import parity as parity_module

    model = outline(system, size=size)
    rate = model.sample_rate
    clip = load_audio(audio, sample_rate=rate) if audio else synthetic_clip(sample_rate=rate)
    clips = [clip, clip[: max(model.shortest(frames=True, scenes=True), len(clip) * 3 // 5)]]
    start = time.perf_counter()
    rows = []
    if not as_json:
        headings = ("to PyTorch", "absolute", "to float64", "PyTorch to float64")
        print(f"{'member':24} {'layer':18} " + " ".join(f"{heading:>10}" for heading in headings))
    for row in parity_module.compare(system, clips, weights=_parse_weights(weights), size=size, seed=seed):
        rows.append(row)
        if not as_json:
            print(
                f"{row.member:24} {row.layer:18} {row.to_pytorch:10.1e} {row.absolute:10.1e} {row.to_oracle:10.1e} "
                f"{row.pytorch_to_oracle:18.1e}{'' if row.passed else '  FAILED'}",
                flush=True,
            )
    seconds, failed = time.perf_counter() - start, [row for row in rows if not row.passed]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if as_json:
        content = {
            "system": find_system(system).name,
            "passed": not failed,
            "bound": parity_module.LAYER_BOUND,
            "seconds": seconds,
            "peak_memory_bytes": peak,
            "rows": [row._asdict() | {"passed": row.passed} for row in rows],
        }
        print(json.dumps(content, indent=1))
    else:
        worst = max(rows, key=lambda row: row.to_pytorch)
        print(
            f"\n{len(rows) - len(failed)} of {len(rows)} rows within {parity_module.LAYER_BOUND:g} of PyTorch, and no "
            f"further from float64 than {parity_module.ORACLE_FACTOR} times PyTorch itself\n"
            f"worst: {worst.member} {worst.layer}, {worst.to_pytorch:.1e}; "
            f"{seconds:.0f} s, peak memory {peak / 2**30:.1f} GiB"
        )
    if failed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def audit(
    model: Annotated[
        str,
        typer.Argument(
            metavar="SYSTEM|hear:MODULE|transformers:NAME",
            help="A system as for embed; a module with HEAR's common API, by its import name; or an audio model of "
            "transformers, the path of its folder or a hub id.",
        ),
    ],
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a system, as for embed; of a HEAR module, the file that its load_model gets; of transformers, "
            "pretrained or random.",
            show_default="pretrained",
        ),
    ] = None,
    size: SizeOption = None,
    bound: Annotated[
        float | None, typer.Option(help="Largest relative difference that passes.", min=0, show_default="1e-5")
    ] = None,
    audio: Annotated[
        list[Path] | None, typer.Option(help="An audio file (repeatable).", show_default="synthetic clips")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--plot", metavar="FIGURE", help="Also draw the differences: .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare each clip's embedding in batches with the clip's alone; exit 1 past the bound.

    The clip's companions are shorter, as long, twice and five times as long, silence or noise, in several orders.
    """
    from gura_jax.audit import compare, report
    from gura_jax.audit.subjects import open_subject

    if picture is not None:
        report.check_picture(picture)
    compare.check_files(audio or [])
    bound = compare.PADDING_BOUND if bound is None else bound
    subject = open_subject(model, weights=_parse_weights(weights), size=size)
    clips = compare.read_clips(audio, subject.sample_rate) if audio else compare.synthetic_clips(subject.sample_rate)
    if not as_json:
        print(f"{report.describe(subject, clips)}\n\n{report.HEADING}")
    results: list[Any] = []
    for found in compare.audit(subject, clips):
        results += found
        if not as_json:
            print(report.line(found, bound), flush=True)
    done = report.Report(subject, clips, results, bound)
    print(json.dumps(done.as_json(), indent=1) if as_json else f"\n{done.summary()}")
    if picture is not None:
        report.draw(done, picture)
    if not done.passed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def finetune(
    task: Annotated[
        Path,
        typer.Argument(
            metavar="TASK",
            help="Folder of a HEAR task; or a manifest (CSV, JSON Lines or Parquet with the columns id and path) whose "
            "columns say each clip's label and split.",
        ),
    ],
    system: SystemOption,
    out: Annotated[Path, typer.Option(help="Folder for the model, checkpoints and log; or to go on in.")],
    train: Annotated[
        str,
        typer.Option(
            help="Beside the head: all; last:N, the last N transformer blocks of each encoder; layer-weights, a "
            "softmax over its hidden states."
        ),
    ] = "all",
    label: Annotated[str | None, typer.Option(help="A manifest's column of labels: text, integers, or lists.")] = None,
    split: Annotated[str, typer.Option(help="A manifest's column of train, valid and perhaps test.")] = "split",
    root: Annotated[
        Path | None, typer.Option(help="What a manifest's paths are relative to.", show_default="its folder")
    ] = None,
    allow_outside: AllowOutsideOption = False,
    weights: WeightsOption = None,
    size: SizeOption = None,
    epochs: Annotated[int, typer.Option(help="At most; the learning rate decays over them.")] = 30,
    patience: Annotated[int, typer.Option(help="Epochs without a better validation before it stops.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Clips of a step, on all devices together.")] = 32,
    accumulate: Annotated[int, typer.Option(help="Parts that a batch is computed in, one after the other.")] = 1,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="The highest, after warm-up.")] = 1e-4,
    layer_decay: Annotated[float, typer.Option(help="Factor of the learning rate from a block to the one before.")] = 1,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")] = 0.1,
    clip_norm: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    weight_decay: Annotated[float, typer.Option(help="AdamW's, of kernels.")] = 0.01,
    dropout: Annotated[float, typer.Option(help="In the transformer blocks.")] = 0.0,
    mask_time: Annotated[float, typer.Option(help="SpecAugment: share of the frames that is masked.")] = 0.0,
    mask_features: Annotated[float, typer.Option(help="SpecAugment: share of the features that is masked.")] = 0.0,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of convolutions and products; weights stay float32.")
    ] = "float32",
    precision: Annotated[
        Literal["highest", "default"], typer.Option(help="Of float32 products; default: TF32 or bfloat16 inside.")
    ] = "highest",
    remat: Annotated[
        Literal["layers"] | None, typer.Option(help="layers: compute layers again for the gradient, for less memory.")
    ] = None,
    checkpoint_steps: Annotated[int, typer.Option(help="Steps between checkpoints, beside one an epoch.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the order of the clips, dropout and masks.")] = 0,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="This is one of several processes, of Slurm, Open MPI or a TPU pod.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the fine-tuning that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a system and a classification head on labelled clips; OUT/model is a system for every other command.

    Run again with the same arguments, it goes on where it stopped, and ends with the same numbers.
    """
    import jax

    from gura_jax.finetune.loop import finetune as run
    from gura_jax.finetune.settings import Settings
    from gura_jax.finetune.tasks import read_labelled

    if distributed:
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as error:
            raise SystemConfigError(f"--distributed: expected a cluster that JAX knows, found: {error}") from None
    settings = Settings(
        train=train,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        learning_rate=learning_rate,
        layer_decay=layer_decay,
        warmup=warmup,
        clip_norm=clip_norm,
        weight_decay=weight_decay,
        patience=patience,
        checkpoint_steps=checkpoint_steps,
        dropout=dropout,
        mask_time=mask_time,
        mask_features=mask_features,
        dtype=dtype,
        seed=seed,
    )
    labelled = read_labelled(task, label=label, split=split, root=root, allow_outside=allow_outside)
    model = load_model(system, weights=_parse_weights(weights), size=size, seed=seed, precision=precision, remat=remat)
    kept = f"the last checkpoint is safe in {out}; run the same command again (without --overwrite) to go on"
    with _interruptible(kept):
        result = run(model, labelled, settings, out, overwrite=overwrite)
    if as_json:
        print(json.dumps(result._asdict(), indent=1))
        return
    print(
        f"epochs: {result.epochs}, best: {result.best_epoch}, validation {result.chosen_by}: {result.valid_score:.4f} "
        f"-> {out / 'model'}"
    )
    for name, value in result.test.items():
        print(f"  test {name:12} {value:.4f}")
    for name, layers in result.layer_weights.items():
        print(f"  layers of {name}: {', '.join(f'{weight:.3f}' for weight in layers)}")
