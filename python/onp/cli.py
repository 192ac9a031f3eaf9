"""The command line. Each command imports what it needs, so that --help and --version are quick."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from onp import __version__
from onp.errors import OnpError, UsageError
from onp.report.streams import prints_on_stderr, say

app = typer.Typer(
    name="onp",
    help="Repair backdoored image classifiers with a few hundred clean images.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Budget(StrEnum):
    """How much work a repair may cost."""

    quick = "quick"
    standard = "standard"
    thorough = "thorough"


class Preset(StrEnum):
    """Usual normalisations of the pixels, by data set."""

    cifar10 = "cifar10"
    gtsrb = "gtsrb"
    imagenet = "imagenet"
    none = "none"


class Finding(StrEnum):
    """Verdicts that can fail a run."""

    backdoor = "backdoor"


Model = Annotated[
    Path, typer.Argument(help="Checkpoint: .safetensors, or a torch.save state dict.")
]
Arch = Annotated[
    str | None,
    typer.Option(
        help="Network: a known name, or with --trust package.module:factory, which may have "
        'arguments: "torchvision.models:efficientnet_b3(num_classes=10)".'
    ),
]
Data = Annotated[
    Path, typer.Option(help="Clean labelled images: folder or zip of class folders, npz, CIFAR.")
]
PresetOption = Annotated[
    Preset | None, typer.Option(help="Normalisation that the network was trained with.")
]
Mean = Annotated[
    str | None, typer.Option(help="Instead of --preset: a mean a channel, as .5,.5,.5.")
]
Std = Annotated[str | None, typer.Option(help="Goes with --mean: a deviation a channel.")]
Split = Annotated[
    str | None, typer.Option(help="Folder of the data to draw from; train, if there is one.")
]
CleanSamples = Annotated[int, typer.Option(min=1, help="Images drawn from the data.")]
BudgetOption = Annotated[Budget, typer.Option(help="How much work to spend on a model.")]
Compact = Annotated[
    bool, typer.Option("--compact", help="Cut pruned channels out: a smaller network.")
]
Recalibrate = Annotated[
    bool,
    typer.Option(
        "--recalibrate", help="Then estimate norm statistics anew: may bring attacks back."
    ),
]
Finetune = Annotated[
    bool,
    typer.Option(
        "--finetune", help="Then tune the weights too, on the images and against the probes."
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same threads, same result.")
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]
Trust = Annotated[bool, typer.Option("--trust", help="Allow code named by --arch or --trigger.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"onp {__version__}")
        raise typer.Exit


@app.callback()
def _onp(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def sanitize(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Where the repaired weights go (.safetensors).")],
    arch: Arch = None,
    report: Annotated[Path | None, typer.Option(help="Also write the report here (JSON).")] = None,
    split: Split = None,
    clean_samples: CleanSamples = 500,
    preset: PresetOption = None,
    mean: Mean = None,
    std: Std = None,
    budget: BudgetOption = Budget.standard,
    target: Annotated[
        str | None,
        typer.Option(help="A class that you suspect, by number or folder: repair it in any case."),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
    fail_on: Annotated[
        Finding | None, typer.Option(help="Exit with 1 if this is the verdict.")
    ] = None,
    compact: Compact = False,
    recalibrate: Recalibrate = False,
    finetune: Finetune = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say where time and image-forwards went.")
    ] = False,
    trust: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Find and prune the neurons that carry a backdoor; write the repaired weights and say why."""
    from onp.files import check_writable, write_json
    from onp.report.profile import Stopwatch
    from onp.report.profile import profile as profile_of

    watch = Stopwatch()
    if out.suffix != ".safetensors":
        raise UsageError(f"--out must end in .safetensors, the format that is written, got {out}")
    _check_distinct(model=model, data=data, out=out, report=report)
    for path in filter(None, (out, report)):
        check_writable(path)

    with watch.step("import"):
        from onp.arguments import checked_device
        from onp.checkpoint import RepairOptions, repair_checkpoint
        from onp.data import load_dataset
        from onp.report import console
        from onp.report.progress import progress_on_stderr
        from onp.suspect.load import load_suspect

    with watch.step("read"), prints_on_stderr():
        checked_device(device)
        preprocess = _preprocess(preset, mean, std)
        suspect = load_suspect(model, arch, trust)
        clean = load_dataset(str(data), split, draw=clean_samples, seed=seed)
        options = RepairOptions(
            budget.value, seed, preprocess, device, threads, recalibrate, finetune, compact,
            None if target is None else clean.class_of(target),
        )  # fmt: skip
    with progress_on_stderr(quiet) as progress:
        full_report = repair_checkpoint(
            suspect, clean, out, options, progress=progress, watch=watch
        )
    if profile:
        full_report["profile"] = profile_of(watch, "repair", full_report)
    if report is not None:
        write_json(report, full_report)
    _show(full_report, console.repair_text, as_json)
    if fail_on is not None and full_report["verdict"] == fail_on.value:
        raise typer.Exit(1)


@app.command()
def batch(
    data: Data,
    out: Annotated[
        Path, typer.Option(help="Folder for repaired weights, reports and the journal.")
    ],
    models: Annotated[
        list[Path] | None, typer.Argument(help="Checkpoints, or folders that hold some.")
    ] = None,
    listing: Annotated[
        Path | None,
        typer.Option(
            "--list", help="CSV of checkpoints instead: model and, if any, arch and target."
        ),
    ] = None,
    arch: Arch = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Models at a time; default: one a core, one on a GPU.")
    ] = None,
    timeout: Annotated[
        int | None, typer.Option(min=1, max=10**6, help="Seconds for a model; default: any.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: the i-th of n parts, for as many machines.")
    ] = None,
    split: Split = None,
    clean_samples: CleanSamples = 500,
    preset: PresetOption = None,
    mean: Mean = None,
    std: Std = None,
    budget: BudgetOption = Budget.standard,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads a model; default: the cores shared out.")
    ] = None,
    as_json: AsJson = False,
    fail_on: Annotated[
        Finding | None, typer.Option(help="Exit with 1 if this is the verdict on any model.")
    ] = None,
    compact: Compact = False,
    recalibrate: Recalibrate = False,
    finetune: Finetune = False,
    trust: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Repair many classifiers with the same clean images. Run it again to go on where it stopped.

    One that fails, or takes its process down, does not touch the others; exit code 2 tells of it.
    """
    from onp.batch.jobs import check_distinct, jobs_of_list, jobs_of_paths, shard_of

    if bool(models) == (listing is not None):
        raise UsageError("name checkpoints or folders, or a --list of them, one of both")
    found = jobs_of_list(listing, arch, out) if listing else jobs_of_paths(models or [], arch, out)
    check_distinct(found)
    found = shard_of(found, shard) if shard else found

    from onp.arguments import checked_device, checked_threads
    from onp.batch.run import journal_of, repair_batch, summary
    from onp.checkpoint import RepairOptions
    from onp.data import load_dataset
    from onp.environment import cores
    from onp.files import make_folder
    from onp.report import console
    from onp.report.progress import progress_on_stderr
    from onp.suspect.load import checked_arch

    checked_device(device)
    if threads is not None:
        checked_threads(threads)
    for kind in {job.arch for job in found}:
        checked_arch(kind, trust)
    options = RepairOptions(
        budget.value, seed, _preprocess(preset, mean, std), device, threads,
        recalibrate, finetune, compact,
    )  # fmt: skip
    clean = load_dataset(str(data), split, draw=clean_samples, seed=seed)
    make_folder(out)
    by_default = cores() // (threads or 1) if device.startswith("cpu") else 1
    outcomes = []
    with _interrupted_by_sigterm(), progress_on_stderr(quiet) as progress:
        progress("batch", 0, len(found), "")
        for outcome in repair_batch(
            found, clean, out, options, children=min(jobs or max(1, by_default), len(found)),
            timeout=timeout, trust=trust, journal=journal_of(shard),
        ):  # fmt: skip
            outcomes.append(outcome)
            progress(
                "batch", len(outcomes), len(found), console.outcome_text(asdict(outcome.entry))
            )
    told = summary(outcomes, out / journal_of(shard))
    _show(told, console.batch_text, as_json)
    if told["failed"]:
        raise typer.Exit(OnpError.exit_code)
    if fail_on is not None and told[fail_on.value]:
        raise typer.Exit(1)


@app.command()
def evaluate(
    model: Model,
    data: Data,
    arch: Arch = None,
    split: Annotated[
        str | None, typer.Option(help="Folder of the data to score on; test, if there is one.")
    ] = None,
    trigger: Annotated[
        str | None,
        typer.Option(help="Known trigger: .npz, or package.module:function with --trust."),
    ] = None,
    target: Annotated[int | None, typer.Option(min=0, help="The trigger's class.")] = None,
    preset: PresetOption = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Score a classifier: accuracy on clean images and, with a known trigger, attack success."""
    if (trigger is None) != (target is None):
        raise UsageError("--trigger and --target go together")

    from onp.arguments import checked_device, torch_settings
    from onp.data import load_dataset
    from onp.metrics import score
    from onp.report import console
    from onp.suspect.load import load_suspect
    from onp.triggers import load_trigger

    place = checked_device(device)
    preprocess = _preprocess(preset, mean, std)
    with prints_on_stderr(), torch_settings(threads):
        put_trigger = None if trigger is None else load_trigger(trigger, trust)
        suspect = load_suspect(model, arch, trust)
        dataset = load_dataset(str(data), split, usual="test")
        scores = score(suspect.model.to(place), dataset, put_trigger, target, preprocess)
    _show(scores | {"sha256": suspect.file.sha256}, console.scores_text, as_json)


@app.command()
def demo(
    seed: Seed = 0, device: Device = "cpu", as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Repair a small backdoored network that comes with onp, and score it before and after."""
    from onp.arguments import checked_device
    from onp.demo import run
    from onp.report import console
    from onp.report.progress import progress_on_stderr

    place = checked_device(device)
    with progress_on_stderr(quiet) as progress:
        outcome = run(seed=seed, device=place, progress=progress)
    _show(outcome, console.demo_text, as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Print versions and what this build and this machine can do."""
    from onp.environment import describe
    from onp.report import console

    _show(describe(), console.environment_text, as_json)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Schedulers end a command by SIGTERM: here it ends as by Ctrl-C, with its children."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_distinct(**paths: Path | None) -> None:
    """Raise UsageError where two of the options name one file."""
    seen: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        other = seen.setdefault(path.resolve(), option)
        if other != option:
            raise UsageError(f"{option} and {other} are the same file: {path}")


def _preprocess(preset: Preset | None, mean: str | None, std: str | None) -> Any:
    """The ``onp.data.Preprocess`` that the options ask for, or None for plain pixels in [0, 1]."""
    from onp.data import PRESETS, Preprocess

    if mean is None and std is None:
        return None if preset is None else PRESETS[preset.value]
    if mean is None or std is None:
        raise UsageError("--mean and --std go together")
    if preset is not None:
        raise UsageError("--preset and --mean exclude each other")
    means, deviations = _numbers("--mean", mean), _numbers("--std", std)
    if len(means) != len(deviations) or min(deviations) <= 0:
        raise UsageError(f"--std must be {len(means)} positive numbers, got {std}")
    return Preprocess(means, deviations)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} must be numbers such as 0.5,0.5,0.5, got {text!r}") from None


def _show(result: dict[str, Any], as_text: Any, as_json: bool) -> None:
    say(json.dumps(result, allow_nan=False) if as_json else as_text(result))
