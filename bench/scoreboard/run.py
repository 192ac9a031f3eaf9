"""Run defences on networks and write a row for each."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.defences.api import Defence, NotApplicable
from bench.defences.told import TOLD
from bench.scoreboard.memory import PeakMemory
from bench.scoreboard.rows import Key, Row, append_rows, plain, put_row
from bench.scoreboard.scoring import Baseline, Examiner, Subject, effectiveness
from bench.zoo.scoring import Scores
from onp.errors import OnpError, UsageError
from onp.ledger import Ledger

Candidates = Sequence[tuple[str, Callable[[], nn.Module]]]
"""As in ``bench.defences.api.Info``."""

_DIGITS = 6
"""Of the shares in a row."""


@dataclass(frozen=True)
class Job:
    """One defence on one network with one seed."""

    model: str
    defence: str
    seed: int
    clean_samples: int
    oracle: bool
    """A row that picks among the defence's candidates with the true trigger is wanted as well."""

    @property
    def told(self) -> bool:
        """It is told of the attack: its row is an oracle's."""
        return self.defence in TOLD

    @property
    def key(self) -> Key:
        return (self.model, self.defence, self.seed, self.clean_samples, self.told)

    @property
    def oracle_key(self) -> Key:
        return (self.model, self.defence, self.seed, self.clean_samples, True)


def pending(jobs: Sequence[Job], rows: Mapping[Key, Row], *, retry_errors: bool) -> list[Job]:
    """The jobs that still lack a row; with ``retry_errors`` those whose row holds an error too."""

    def settled(row: Row | None) -> bool:
        return row is not None and not (retry_errors and row.error is not None)

    def done(job: Job) -> bool:
        row = rows.get(job.key)
        if row is None or not settled(row):
            return False
        has_oracle = job.oracle and row.candidates > 0 and not row.clean_twin
        return not has_oracle or settled(rows.get(job.oracle_key))

    return [job for job in jobs if not done(job)]


class Runner:
    """Runs jobs in turn; every row is on the disk before the next job starts."""

    def __init__(
        self,
        subjects: Mapping[str, Subject],
        defences: Mapping[str, Defence],
        examiner: Examiner,
        path: Path,
        provenance: Mapping[str, Any],
        oracle_images: int | None = None,
    ) -> None:
        self._subjects = subjects
        self._defences = defences
        self._examiner = examiner
        self._path = path
        self._provenance = provenance
        self._oracle_images = oracle_images

    def run(self, jobs: Sequence[Job], rows: dict[Key, Row]) -> list[str]:
        """Run the jobs, add their rows to ``rows`` and the file; returns what could not be run.

        A defence that fails leaves a row with its error; a network that cannot be scored before any
        defence leaves no row and is named in what is returned.
        """
        broken: dict[str, str] = {}
        started = time.perf_counter()
        for number, job in enumerate(jobs, start=1):
            if job.model in broken:
                continue
            try:
                before = self._examiner.baseline(job.model)
            except UsageError:
                raise
            except (OnpError, OSError) as error:
                broken[job.model] = f"{job.model}: {error}"
                _say(broken[job.model])
                continue
            self._check_comparable(job, rows)
            made = self._rows(job, before, rows)
            append_rows(self._path, made)
            for row in made:
                put_row(rows, row)
            left = (time.perf_counter() - started) / number * (len(jobs) - number)
            for row in made:
                _say(f"{number}/{len(jobs)} {line(row)}; about {duration(left)} left")
        return list(broken.values())

    def _check_comparable(self, job: Job, rows: Mapping[Key, Row]) -> None:
        """Raise UsageError where rows of the file were scored on other test images."""
        dataset = self._subjects[job.model].card["dataset"]
        count, data = len(self._examiner.test(dataset)), self._examiner.test_data(dataset)
        others = {
            f"{row.test_images} ({row.test_data or 'unknown'})"
            for row in rows.values()
            if row.dataset == dataset
            and (row.test_images != count if row.test_data is None else row.test_data != data)
        }
        if others:
            raise UsageError(
                f"{self._path} holds rows scored on {', '.join(sorted(others))} test images of "
                f"{dataset}, not {count} ({data}): use the same --data and --test-images or "
                "another --out"
            )

    def _rows(self, job: Job, before: Baseline, rows: Mapping[Key, Row]) -> list[Row]:
        """The job's row and, where the defence chose from candidates, the oracle's.

        Both are of one run: where only the oracle's is missing, the other is made anew with it. A
        row that is there gives way to no error, though: the error is then the oracle's alone.
        """
        row, candidates = self._defend(job, before)
        kept = rows.get(job.key)
        if row.error is not None and kept is not None and kept.error is None:
            return [replace(row, oracle=True)]
        made = [row]
        if job.oracle and candidates and not row.clean_twin:
            made.append(self._oracle(job, row, before, candidates))
        return made

    def _defend(self, job: Job, before: Baseline) -> tuple[Row, Candidates]:
        """Run the defence on a copy of the network, then score what it gives back."""
        subject, ledger = self._subjects[job.model], Ledger()
        clean = self._examiner.clean(subject.card["dataset"], job.seed)
        exam = self._examiner.exam(job.model)
        suspect = deepcopy(subject.model).eval()
        row = self._row(job, before)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)  # for defences that draw from torch's own generator
            peak, started, cpu_started = PeakMemory(), time.perf_counter(), time.process_time()
            try:
                defence: Defence
                if job.told:
                    assert subject.attack is not None  # clean twins have no such job
                    defence = partial(TOLD[job.defence], attack=subject.attack)
                else:
                    defence = self._defences[job.defence]
                model, info = defence(suspect, clean, seed=job.seed, ledger=ledger)
                spent, cpu_spent = time.perf_counter() - started, time.process_time() - cpu_started
                memory = peak.megabytes()
                after = exam.score(model.eval())
            except NotApplicable as reason:
                return replace(row, applicable=False, reason=str(reason)), []
            except Exception as error:  # whatever a defence dies of, the others go on
                return replace(row, error=described(error)), []
        settings = plain(info.settings)
        row = replace(
            scored(row, before, after),
            seconds=round(spent, 3),
            cpu_seconds=round(cpu_spent, 3),
            image_forwards=ledger.total,
            peak_memory_mb=memory,
            schedule=info.schedule,
            settings=settings,
            candidates=len(info.candidates),
            verdict=settings.get("verdict"),
            pruned=settings.get("pruned"),
        )
        # What the defence chose is a candidate too: on the images that the oracle picks by no pick
        # is worse; on all of them one may be.
        own: Candidates = [("the defence's own", lambda: model)] if info.candidates else []
        return row, [*info.candidates, *own]

    def _oracle(self, job: Job, row: Row, before: Baseline, candidates: Candidates) -> Row:
        """The candidate of highest DER under the true trigger, at the cost of the whole run.

        Its settings hold the whole sweep as (candidate, CA, ASR): how sharp a threshold's edge is.
        """
        exam = self._examiner.exam(job.model)
        judge = exam.part(self._oracle_images)
        by = len(judge.clean)
        row = replace(row, oracle=True, oracle_images=by, verdict=None, pruned=None)

        try:
            sweep = [judge.score(build().eval()) for _, build in candidates]
            ratings = [effectiveness(before.scores, after) or 0.0 for after in sweep]
            setting, build = candidates[ratings.index(max(ratings))]
            best = exam.score(build().eval())
        except Exception as error:
            failed = replace(self._row(job, before), error=described(error))
            return replace(failed, oracle=True, oracle_images=by)
        settings = {
            "pick": setting,
            "sweep": [
                [name, round(after.ca, 3), None if after.asr is None else round(after.asr, 3)]
                for (name, _), after in zip(candidates, sweep, strict=True)
            ],
        }
        return replace(scored(row, before, best), settings=settings)

    def _row(self, job: Job, before: Baseline) -> Row:
        """The row as far as it is known before the defence runs."""
        card, exam = self._subjects[job.model].card, self._examiner.exam(job.model)
        scores, twin = before.scores, before.asr_clean_twin
        return Row(
            model=job.model,
            dataset=card["dataset"],
            arch=card["arch"],
            attack=card["attack"],
            ratio=card["ratio"],
            target=card["target"],
            defence=job.defence,
            seed=job.seed,
            clean_samples=job.clean_samples,
            oracle=job.told,
            ca_before=_rounded(scores.ca),
            asr_before=_rounded(scores.asr),
            ra_before=_rounded(scores.ra),
            asr_clean_twin=_rounded(twin),
            der_ceiling=None if scores.asr is None else _rounded((1 + scores.asr) / 2),
            test_images=len(exam.clean),
            triggered_images=len(exam.triggered) if exam.triggered is not None else None,
            test_data=self._examiner.test_data(card["dataset"]),
            weights=self._subjects[job.model].digest,
            **self._provenance,
        )


def scored(row: Row, before: Baseline, after: Scores) -> Row:
    """The row with what the network scores after the defence."""
    twin, rating = before.asr_clean_twin, effectiveness(before.scores, after)
    ceiling = None if before.scores.asr is None else (1 + before.scores.asr) / 2
    return replace(
        row,
        ca_after=_rounded(after.ca),
        asr_after=_rounded(after.asr),
        ra_after=_rounded(after.ra),
        excess_asr=None if after.asr is None or twin is None else _rounded(after.asr - twin),
        der=_rounded(rating),
        der_shortfall=None if rating is None or ceiling is None else _rounded(ceiling - rating),
    )


def described(error: Exception) -> str:
    """Kind, message and place of an error in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def line(row: Row) -> str:
    """A row in one line, for people."""
    head = f"{row.model}, {row.defence}, seed {row.seed}{', oracle' if row.oracle else ''}: "
    if row.error is not None:
        return head + f"FAILED: {row.error}"
    if not row.applicable:
        return head + f"does not apply: {row.reason}"
    text = f"CA {_percent(row.ca_before)} -> {_percent(row.ca_after)}"
    if row.asr_after is not None:
        text += f", ASR {_percent(row.asr_before)} -> {_percent(row.asr_after)}"
    return head + f"{text}, {row.seconds:.1f} s"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.1f}"


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, _DIGITS)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
