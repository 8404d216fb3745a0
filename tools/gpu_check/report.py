"""The results: one JSON file for a run, and tables short enough to read."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.table import ROOF, Row, described, pivot

from .run import Section

MOST_CHARACTERS = 11_500  # of all tables
FIRST = ["auto", "screen", "halves", "tensor", "simt", "composite"]  # the order of the ways in a table


class Report:
    """Written after every section, to a file of its own."""

    def __init__(self, folder: Path, date: str, revision: str | None) -> None:
        self.folder = folder
        self.file = folder / f"unknown-{date}.json"
        self.data: dict[str, Any] = {"date": date, "revision": revision, "machine": {}, "sections": []}

    def describe(self, facts: Row) -> None:
        """Names the file after the device and the day; a further run of that day gets a number."""
        self.data["machine"] = {name: value for name, value in facts.items() if name != "index"}
        slug = re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")
        name, number = f"{slug}-{self.data['date']}", 1
        while (self.folder / f"{name}{f'-{number}' if number > 1 else ''}.json").exists():
            number += 1
        self.file = self.folder / f"{name}{f'-{number}' if number > 1 else ''}.json"
        self._write()

    def add(self, section: Section) -> None:
        self.data["sections"].append(asdict(section) | {"wrong": section.is_wrong})
        if self.data["machine"]:
            self._write()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".part")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(unfinished, self.file)

    @property
    def sections(self) -> list[dict[str, Any]]:
        return list(self.data["sections"])

    def wrong(self) -> list[str]:
        """Names of the sections that show a mistake."""
        return [section["name"] for section in self.sections if section["wrong"]]

    def skipped(self) -> list[str]:
        """Names of the sections that did not run: a tool is missing, or time was up."""
        return [section["name"] for section in self.sections if section["status"] == "skipped"]

    @property
    def ceilings(self) -> dict[str, float]:
        """What the machine reaches with nothing else to do."""
        rows = [row for section in self.sections if section["name"] == "machine" for row in section["rows"]]
        return {row["name"]: row["value"] for row in rows if "value" in row}

    def table(self) -> str:
        """What happened, to be printed last."""
        m = self.data["machine"]
        lines = [
            f"\n=== {m['device']}, compute capability {m['capability']}, torch {m['torch']}, CUDA {m['cuda']}, "
            f"{self.data['date']}, revision {self.data['revision']}",
            f"roofline, measured now: {described(self.ceilings)}",
        ]
        for section in self.sections:
            note = section["note"].replace("\n", " | ")
            lines.append(f"{section['status']:8} {section['name']:10} {section['seconds']:6.1f} s  {note[:300]}")
        rows = [row for section in self.sections for row in section["rows"] if "kernel" in row]
        lines += [*_times(rows), *_launches(rows), *_counters(rows)]
        text = "\n".join(lines)
        return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "\n… the rest is in the file"


def _times(rows: list[Row]) -> list[str]:
    """The tables of times."""
    kernels: dict[str, list[Row]] = {"loss": [], "step": [], "others": []}
    for row in rows:
        if "way" in row and row["kernel"] != "launches":
            kernels.get(row["kernel"], kernels["others"]).append(row)
    shape = ["B", "M", "D"]
    title = "memory_loss and its gradient; density: share of the negatives that are active"
    lines = pivot(f"{title}: us, % of roof", kernels["loss"], [*shape, "density"], "way", FIRST)
    title = "the same of other losses; passes over the bank and the batch"
    lines += pivot(f"{title}: us, % of roof", kernels["others"], ["kernel", *shape], "way", FIRST)
    lines += pivot("whole step: us, % of roof", kernels["step"], [*shape, "density"], "way", FIRST)
    return ["", ROOF, *lines] if lines else []


def _launches(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["kernel"] == "launches" and "kernels" in row:
            longest = ", ".join(f"{name} {value:.1f}" for name, _, value in row["kernels"][:14])
            lines += ["", f"a step by {row['way']}: {row['launches']:g} launches, {row.get('us', 0)} us: {longest}"]
    return lines


def _counters(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        if "stalls" in row:
            lines.append(", ".join(str(value) if name in ("kernel", "stalls") else f"{name} {value:g}"
                                   for name, value in row.items()))  # fmt: skip
    return ["", "counted:", *lines] if lines else []
