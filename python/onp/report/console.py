"""Reports as text for people. Each function takes the dict that --json prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_VERDICTS = {
    "backdoor": "backdoor found and pruned",
    "clean": "no backdoor found",
    "suspected": "no backdoor found; repaired as suspected",
}


def repair_text(report: Mapping[str, Any]) -> str:
    """A repair: the verdict and why, what was pruned, what it cost, where the result is.

    Reads ``verdict``, ``reason``, ``target_classes`` (list of int), ``accuracy`` (``before``,
    ``after``, ``images``), ``sites`` (``total``, ``pruned``), ``layers`` (list of ``name``,
    ``sites``, ``pruned``: channel numbers), ``aftercare`` (None, or ``recalibrated``,
    ``finetuned``, ``accuracy``), ``seconds`` (stage -> float, ``total`` among them);
    ``suspect`` and ``repaired`` (``path``, ``sha256``) and ``profile`` (see ``profile_text``) where
    the command line added them.
    """
    verdict = str(report["verdict"])
    accuracy, sites = report["accuracy"], report["sites"]
    rows = [
        ("verdict", f"{_VERDICTS.get(verdict, verdict)} ({report['reason']})"),
        ("target class", ", ".join(map(str, report["target_classes"])) or "none"),
        ("pruned", f"{sites['pruned']} of {sites['total']} sites"),
        *_pruned_rows(report["layers"]),
        (
            "accuracy",
            f"{_percent(accuracy['before'])} -> {_percent(accuracy['after'])} "
            f"on {accuracy['images']:,} clean images",
        ),
        *_aftercare_rows(report["aftercare"]),
        ("time", f"{report['seconds']['total']:.1f} s"),
    ]
    for role in ("suspect", "repaired"):
        if role in report:
            file = report[role]
            rows.append((role, f"{file['path']} (sha256 {file['sha256'][:16]}...)"))
    text = _aligned(rows)
    return f"{text}\n\n{profile_text(report['profile'])}" if "profile" in report else text


def profile_text(profile: Mapping[str, Any]) -> str:
    """Where the time went: ``wall`` (seconds), ``accounted`` (share), ``stages`` (list of
    ``stage``, ``seconds``, ``share``, ``image_forwards``)."""
    rows = [
        (
            stage["stage"],
            f"{stage['seconds']:8.2f} s {100 * stage['share']:5.1f}% "
            f"{stage['image_forwards']:9,} image-forwards",
        )
        for stage in profile["stages"]
    ]
    forwards = sum(stage["image_forwards"] for stage in profile["stages"])
    accounted = 100 * profile["accounted"]
    total = f"{profile['wall']:8.2f} s {accounted:5.1f}% {forwards:9,} image-forwards"
    return _aligned([*rows, ("wall clock", total)])


def scores_text(scores: Mapping[str, Any]) -> str:
    """Scores: ``clean_accuracy`` and ``images``; with a trigger also ``attack_success_rate``,
    ``robust_accuracy``, ``triggered_images`` and ``target``. A rate of None is undefined."""
    rows = [("clean accuracy", _rate(scores["clean_accuracy"], scores["images"], "images"))]
    if "attack_success_rate" in scores:
        images, kind = scores["triggered_images"], f"triggered images, target {scores['target']}"
        rows.append(("attack success", _rate(scores["attack_success_rate"], images, kind)))
        rows.append(("robust accuracy", _rate(scores["robust_accuracy"], images, kind)))
    return _aligned(rows)


def batch_text(summary: Mapping[str, Any]) -> str:
    """A batch: a line for each model that was pruned, then for each that failed, then the counts.

    Reads ``entries`` (list of what ``outcome_text`` reads), ``models``, ``backdoor``, ``clean``,
    ``suspected``, ``failed``, ``done_before`` (counts) and ``journal`` (path).
    """
    entries = summary["entries"]
    found = [outcome_text(one) for one in entries if one["verdict"] in ("backdoor", "suspected")]
    failed = [outcome_text(one) for one in entries if one["error"] is not None]
    kinds = ["backdoor", "clean", *["suspected"] * bool(summary["suspected"]), "failed"]
    counts = [f"{summary[kind]} {kind}" for kind in kinds]
    before = f", {summary['done_before']} done before" * bool(summary["done_before"])
    last = f"{summary['models']} models: {', '.join(counts)}{before} ({summary['journal']})"
    return "\n".join([*found, *failed, last])


def outcome_text(entry: Mapping[str, Any]) -> str:
    """One model of a batch: ``model`` (path) and ``error``, or ``verdict``, ``target_classes``,
    ``pruned`` (sites), ``accuracy_before`` and ``accuracy_after``."""
    model = _printable(entry["model"])
    if entry["error"] is not None:
        error = entry["error"].removeprefix(f"{entry['model']}: ")  # where it is named as well
        return f"failed    {model}: {_printable(error)}"
    if entry["verdict"] == "clean":
        return f"{entry['verdict']:<8}  {model}"
    classes = ", ".join(map(str, entry["target_classes"]))
    accuracy = f"{_percent(entry['accuracy_before'])} -> {_percent(entry['accuracy_after'])}"
    pruned = f"{entry['pruned']} sites pruned, {accuracy}"
    return f"{entry['verdict']:<8}  {model}: class {classes}, {pruned}"


def demo_text(outcome: Mapping[str, Any]) -> str:
    """The demo: ``report`` for ``repair_text``, ``before`` and ``after`` for ``scores_text``."""
    parts = [
        "Repair, from clean images alone",
        repair_text(outcome["report"]),
        "",
        "Scores before, with the true trigger",
        scores_text(outcome["before"]),
        "",
        "Scores after",
        scores_text(outcome["after"]),
    ]
    return "\n".join(parts)


def environment_text(environment: Mapping[str, Any]) -> str:
    """The facts of ``onp.environment.describe``, one a line."""
    return _aligned((name.replace("_", " "), _plain(value)) for name, value in environment.items())


def _aftercare_rows(aftercare: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """A row for what was done after pruning, if anything."""
    if aftercare is None:
        return []
    done = [name for name in ("recalibrated", "finetuned") if aftercare[name]]
    text = f"{', '.join(done)}: {_percent(aftercare['accuracy'])} on the same clean images"
    return [("aftercare", text)]


def _pruned_rows(layers: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """A row for each layer that lost channels."""
    return [
        ("", f"{layer['name']}: {len(layer['pruned'])} of {layer['sites']}")
        for layer in layers
        if layer["pruned"]
    ]


def _rate(value: float | None, count: int, kind: str) -> str:
    return f"{'undefined' if value is None else _percent(value)} of {count:,} {kind}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def _printable(text: str) -> str:
    """Names of files may hold anything, ends of lines among it."""
    return text if text.isprintable() else ascii(text)


def _plain(value: Any) -> str:
    if value is None:
        return "not here"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _aligned(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns."""
    all_rows = list(rows)
    width = max(len(name) for name, _ in all_rows)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in all_rows)
