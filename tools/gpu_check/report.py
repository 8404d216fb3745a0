"""The results: one JSON file for a run, and tables short enough to read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .run import Row, Section

UNITS = {"copy": "GB/s", "read": "GB/s"}
MOST_CHARACTERS = 11_500  # of all tables
FIRST = ["auto", "screen", "tensor", "simt", "composite"]  # the order of the ways in a table


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
            "ceilings: "
            + ", ".join(f"{name} {value:g} {UNITS.get(name, 'TFLOP/s')}" for name, value in self.ceilings.items()),
        ]
        for section in self.sections:
            note = section["note"].replace("\n", " | ")
            lines.append(f"{section['status']:8} {section['name']:10} {section['seconds']:6.1f} s  {note[:300]}")
        rows = [row for section in self.sections for row in section["rows"] if "kernel" in row]
        lines += [*_loss(rows), *_bank(rows), *_step(rows), *_launches(rows), *_counters(rows)]
        text = "\n".join(lines)
        return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "\n… the rest is in the file"


def _pivot(title: str, rows: list[Row], index: list[str], key: Callable[[Row], str],
           cell: Callable[[Row], str]) -> list[str]:  # fmt: skip
    """A line per combination of the `index` fields, a column per `key`."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    columns: dict[str, None] = {}
    for row in sorted(rows, key=_order):
        groups.setdefault(tuple(row.get(name, "-") for name in index), {})[key(row)] = row
        columns[key(row)] = None
    if not groups:
        return []
    table = [[*index, *columns]]
    table += [[*map(_short, group), *(cell(of[name]) if name in of else "-" for name in columns)]
              for group, of in sorted(groups.items(), key=lambda item: str(item[0]))]  # fmt: skip
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return ["", title, *("  ".join(word.rjust(w) for word, w in zip(line, widths, strict=True)) for line in table)]


def _order(row: Row) -> tuple[int, str]:
    way = str(row.get("way", "")).split(" ")[0]
    return (FIRST.index(way) if way in FIRST else len(FIRST), str(row.get("way", "")))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def us(row: Row) -> str:
    """Microseconds, and the share of the ceiling that binds in %; `*` where the host's time is in it."""
    if "us" not in row:
        return next((word for word in ("out of memory", "error", "skipped") if word in row), "-").split(" ")[0]
    digits = 0 if row["us"] >= 100 else 1
    share = f" {row['of_ceiling']:.0f}%" if "of_ceiling" in row else ""
    return f"{row['us']:.{digits}f}{'*' if row['how'] == 'events' else ''}{share}"


def _loss(rows: list[Row]) -> list[str]:
    title = "memory_loss and its gradient: us, % of the ceiling; density: share of the negatives that are active"
    return _pivot(title, [row for row in rows if row["kernel"] == "loss"], ["B", "M", "D", "density"],
                  lambda row: row["way"], us) + _pivot(
        "the same for other losses", [row for row in rows if "way" in row and row["kernel"] in OTHERS],
        ["kernel", "B", "M", "D"], lambda row: row["way"], us)  # fmt: skip


OTHERS = ("supcon", "ntxent", "multi_similarity", "triplet")


def _bank(rows: list[Row]) -> list[str]:
    wanted = ("normalize", "transform_", "standardize_", "track_", "enqueue_", "batch_loss")
    return _pivot("passes over the bank and the batch: us", [row for row in rows if row["kernel"] in wanted],
                  ["kernel", "B", "M", "D"], lambda row: row["way"], us)  # fmt: skip


def _step(rows: list[Row]) -> list[str]:
    return _pivot("whole step: us", [row for row in rows if row["kernel"] == "step"], ["B", "M", "D", "density"],
                  lambda row: row["way"], us)  # fmt: skip


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
