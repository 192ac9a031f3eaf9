"""What is printed and written of a summary: Markdown, JSON, figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.scoreboard import markdown
from bench.scoreboard.figures import draw_figures
from bench.scoreboard.leaderboard import PublicMean, public_means
from bench.scoreboard.rows import Row
from bench.scoreboard.summary import Summary
from onp.files import write_atomically

_BACKBONE = "preactresnet18"

_PUBLIC_NOTE = """\
BackdoorBench's public means, {dataset}, {backbone}, all attacks and poisoning ratios. **Other
networks, other data budgets (5% clean by default), other machines: context, not a comparison.**
Some of its defences pick thresholds by the attack success on test images (ANP). Where no backdoor
is flagged NC returns the network as it was."""


@dataclass(frozen=True)
class Report:
    """A summary and where it comes from."""

    title: str
    commands: Sequence[str]
    """Calls that give the rows from nothing."""
    rows: Sequence[Row]
    """The rows that are summarised."""
    summary: Summary
    left_out: Mapping[str, str]
    """Networks that were left out, and why."""
    public: Mapping[str, Sequence[PublicMean]]
    """BackdoorBench's means by data set."""

    def markdown(self) -> str:
        """Commands, environment and tables."""
        parts = [f"# Scoreboard: {self.title}", *(f"`{command}`" for command in self.commands)]
        parts += [markdown.environment(self.rows), markdown.tables(self.summary)]
        if self.left_out:
            parts += ["### Left out", markdown.left_out(self.left_out)]
        for dataset, means in self.public.items():
            parts += ["### Elsewhere", _PUBLIC_NOTE.format(dataset=dataset, backbone=_BACKBONE)]
            parts += [markdown.public_table(means)]
        return "\n\n".join(part.strip() for part in parts) + "\n"

    def as_json(self) -> str:
        """The summary's fields, with what was left out and the public means."""
        public = {
            dataset: [asdict(mean) for mean in means] for dataset, means in self.public.items()
        }
        value = asdict(self.summary) | {"left_out": dict(self.left_out), "public": public}
        return json.dumps(value, indent=2, allow_nan=False) + "\n"

    def write(self, out: Path) -> None:
        """``<stem>.md`` and the figures beside the rows' file ``out``."""
        text = self.markdown()

        def fill(part: Path) -> None:
            part.write_text(text, encoding="utf-8")

        write_atomically(out.with_suffix(".md"), fill)
        try:
            draw_figures(out, self.rows, self.summary.defences)
        except ImportError as error:
            print(f"no figures: {error}", file=sys.stderr)


def public_context(path: Path, rows: Sequence[Row]) -> dict[str, list[PublicMean]]:
    """Public means of the data sets that the rows have and BackdoorBench has as well."""
    datasets = dict.fromkeys(row.dataset for row in rows)
    found = {dataset: public_means(path, dataset, _BACKBONE) for dataset in datasets}
    return {dataset: means for dataset, means in found.items() if means}
