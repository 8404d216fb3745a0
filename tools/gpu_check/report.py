"""The results: one JSON file for a device and a day, and tables short enough to read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .run import ROOT, Row, Section

SWEEPS = ("tensor", "simt")
UNITS = {"copy": "GB/s", "l2 read": "GB/s"}
MOST_CHARACTERS = 11_000  # of all tables of a part


class Report:
    """Written anew after every section; the parts of one day meet in one file."""

    def __init__(self, folder: Path, facts: Row, date: str) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")
        self.file = folder / f"{slug}-{date}.json"
        self.data: dict[str, Any] = {"date": date, "machine": {}, "parts": {}}
        if self.file.exists():
            self.data = json.loads(self.file.read_text())
        self.data["machine"] = facts

    def begin(self, part: str) -> None:
        self.data["parts"][part] = []

    def add(self, part: str, section: Section) -> None:
        self.data["parts"][part].append(asdict(section) | {"wrong": section.is_wrong})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".part")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(unfinished, self.file)

    def sections(self, part: str) -> list[dict[str, Any]]:
        return list(self.data["parts"].get(part, []))

    def wrong(self, parts: list[str]) -> list[str]:
        """Names of the sections of these parts that show a mistake."""
        return [section["name"] for part in parts for section in self.sections(part) if section["wrong"]]

    def skipped(self, parts: list[str]) -> list[str]:
        """Names of the sections of these parts that did not run: a tool is missing, or time was up."""
        return [section["name"] for part in parts for section in self.sections(part) if section["status"] == "skipped"]

    @property
    def ceilings(self) -> dict[str, float]:
        """What has been measured of them today, in whichever part."""
        found: dict[str, float] = {}
        for part in self.data["parts"].values():
            for section in part:
                if section["name"] == "ceilings":
                    found |= {row["name"]: row["value"] for row in section["rows"] if "value" in row}
        return found

    def table(self, part: str) -> str:
        """What happened in a part, to be printed last."""
        sections = self.sections(part)
        m = self.data["machine"]
        lines = [
            f"\n=== Part {part}: {m['device']}, compute capability {m['capability']}, torch {m['torch']}, CUDA "
            f"{m['cuda']}, nvcc {m['nvcc']}, {self.data['date']}",
            "ceilings: "
            + ", ".join(f"{name} {value:g} {UNITS.get(name, 'TFLOP/s')}" for name, value in self.ceilings.items()),
        ]
        for section in sections:
            note = section["note"].replace("\n", " | ")
            lines.append(f"{section['status']:8} {section['name']:20} {section['seconds']:6.1f} s  {note[:260]}")
        rows = {section["name"]: section["rows"] for section in sections}
        lines += [*_registers(rows), *_loss(rows), *_bank(rows), *_step(rows), *_crossover(rows)]
        text = "\n".join(lines)
        return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "\n… the rest is in the file"


Rows = dict[str, list[Row]]
Cell = Callable[[dict[str, Row]], str]


def _pivot(
    title: str, rows: list[Row], index: list[str], columns: dict[str, Cell], key: Callable[[Row], str]
) -> list[str]:
    """A line per combination of the `index` fields; a column's cell gets the rows of the line by `key`."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if all(name in row for name in index):
            groups.setdefault(tuple(row[name] for name in index), {})[key(row)] = row
    if not groups:
        return []
    table = [[*index, *columns]]
    table += [[*map(str, group), *(cell(ways) for cell in columns.values())] for group, ways in groups.items()]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return ["", title, *("  ".join(word.rjust(w) for word, w in zip(line, widths, strict=True)) for line in table)]


def _us(way: str) -> Cell:
    """Microseconds; `*` where the host's time is in it."""

    def cell(ways: dict[str, Row]) -> str:
        row = ways.get(way, {})
        if "us" not in row:
            return "oom" if "out of memory" in row else "error" if "error" in row else "-"
        digits = 0 if row["us"] >= 100 else 1
        return f"{row['us']:.{digits}f}" + ("*" if row["how"] == "events" else "")

    return cell


def _times(way: str, ours: str) -> Cell:
    """How many times the time of ours."""

    def cell(ways: dict[str, Row]) -> str:
        a, b = ways.get(way, {}), ways.get(ours, {})
        if "us" in a and "us" in b:
            return f"{a['us'] / b['us']:.2f}" + ("*" if "events" in (a["how"], b["how"]) else "")
        return _us(way)(ways) if "us" not in a else "-"

    return cell


def _field(way: str, name: str, digits: int = 0) -> Cell:
    def cell(ways: dict[str, Row]) -> str:
        value = ways.get(way, {}).get(name)
        return "-" if value is None else f"{value:.{digits}f}"

    return cell


def _registers(rows: Rows) -> list[str]:
    kernels = [row for row in rows.get("registers", []) if row["kernel"].startswith(("sweep", "rewrite"))]
    if not kernels:
        return []
    return ["", "registers: " + ", ".join(f"{row['kernel'][:18]} {row['reg']}" for row in kernels)]


def _loss(rows: Rows) -> list[str]:
    def key(row: Row) -> str:
        return f"{row['way']} {row['density']:g}" if row["way"] == "tensor" else row["way"]

    columns = {
        "tensor 0": _us("tensor 0"),
        "1e-3": _us("tensor 0.001"),
        "0.1": _us("tensor 0.1"),
        "% of ceiling": _field("tensor 0.001", "of_ceiling"),
        "simt": _us("simt"),
        " %": _field("simt", "of_ceiling"),
        "composite": _us("composite"),
        "%": _field("composite", "of_ceiling"),
        "tf32": _us("composite tf32"),
        "% ": _field("composite tf32", "of_ceiling"),
        "torch": _us("torch"),
        "torch tf32": _us("torch tf32"),
        "x tensor": _times("torch", "tensor 0.001"),
        "x simt": _times("torch", "simt"),
        "x tf32": _times("torch tf32", "composite tf32"),
    }
    title = "loss and gradient, us; tensor by the share of active negatives, the others at 1e-3; x: torch over ours"
    return _pivot(title, rows.get("loss", []), ["B", "M", "D"], columns, key)


def _bank(rows: Rows) -> list[str]:
    columns = {
        "us": _us("xbn_ext"),
        "GB/s": _field("xbn_ext", "gb_s"),
        "% of ceiling": _field("xbn_ext", "of_ceiling"),
        "peak MB": _field("xbn_ext", "peak_mb", 1),
        "torch us": _us("torch"),
        "x": _times("torch", "xbn_ext"),
    }
    return _pivot("passes over the bank and the batch", rows.get("bank", []), ["kernel", "B", "M", "D"], columns,
                  lambda row: row["way"])  # fmt: skip


def _step(rows: Rows) -> list[str]:
    columns = {
        "in place": _us("xbn_ext"),
        "%": _field("xbn_ext", "of_ceiling"),
        "peak MB": _field("xbn_ext", "peak_mb"),
        "tensor": _us("xbn_ext tensor"),
        "deferred": _us("xbn_ext deferred"),
        "tf32": _us("xbn_ext tf32"),
        "eager": _times("eager", "xbn_ext"),
        "tuned": _times("eager-tuned", "xbn_ext"),
        "tuned tf32": _times("eager-tuned tf32", "xbn_ext"),
        "compile": _times("compile", "xbn_ext"),
        "compile tf32": _times("compile tf32", "xbn_ext"),
    }
    title = "whole step: ours in us, PyTorch's as a multiple of ours in place; * launched one by one, not a graph"
    all_rows = [*rows.get("step", []), *rows.get("compile", [])]
    return _pivot(title, all_rows, ["B", "M", "D"], columns, lambda row: row["way"])


def _crossover(rows: Rows) -> list[str]:
    columns = {way: _us(way) for way in ("tensor", "simt", "composite", "composite tf32")}
    lines = _pivot("sweeps against composite", rows.get("crossover", []), ["B", "M", "D"], columns,
                   lambda row: row["way"])  # fmt: skip
    if not lines:
        return []
    for way in ("composite", "composite tf32"):
        first = ", ".join(f"{sweep} from B = {composite_from(rows['crossover'], way, sweep)}" for sweep in SWEEPS)
        lines.append(f"{way} wins over {first}; csrc/cuda/backend.cpp says {threshold()}")
    return lines


def composite_from(rows: list[Row], way: str, sweep: str) -> int | None:
    """The smallest measured B from which on `way` is faster than that sweep at every larger one, too."""
    us = {(row["way"], row["B"]): row["us"] for row in rows if "us" in row}
    first = None
    for B in sorted({B for _, B in us}, reverse=True):
        if us.get((way, B), float("inf")) >= us.get((sweep, B), float("inf")):
            break
        first = B
    return first


def threshold() -> int:
    """From how many anchors the backend takes the composite way, as its source says."""
    found = re.search(r"kCompositeFrom = (\d+)", (ROOT / "csrc" / "cuda" / "backend.cpp").read_text())
    if found is None:
        raise RuntimeError("csrc/cuda/backend.cpp has no kCompositeFrom any more")
    return int(found[1])
