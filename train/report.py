"""``report RUN``: a finished run on one page, from its metrics.json and its pictures."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from . import checkpoint, losses, outputs, page, results, terminal
from .about import file_path, folder_path
from .config import Config, ConfigError
from .program import called
from .trained import NO_RUN

SCORES = {"map@r": "MAP@R", "recall@": "Recall@"}
HEADLINE = ("recall@1", "map@r")
OTHERS = "other"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    terminal.prepare()
    parser = argparse.ArgumentParser(
        prog=called("report"),
        description="Show a finished run on one page of HTML: scores, curves, neighbours, settings, data and machine.",
    )
    parser.add_argument("run", metavar="RUN", type=folder_path, help="the --out of a finished run")
    parser.add_argument("--out", type=file_path, help=f"the page (default: {checkpoint.REPORT} in RUN)")
    given = parser.parse_args(arguments)
    out = given.out or given.run / checkpoint.REPORT
    try:
        write(given.run, out)
    except ConfigError as error:
        return terminal.refuse("report", error)
    terminal.say(out)
    return 0


def write(run: Path, out: Path) -> None:
    """Write the page.

    Raises:
        ConfigError: there is no such run, or it is not finished; or the page cannot be written, or would replace
            what is no page.
    """
    require_finished(run)
    metrics = checkpoint.read_metrics(run, NO_RUN, "RUN")
    outputs.require_page(out)
    with checkpoint.reading(run / checkpoint.METRICS, NO_RUN, "RUN"):
        values = _values(metrics)
    pictures = {name: page.png(run / name) for name in (checkpoint.CURVES, checkpoint.NEIGHBOURS)}
    html = page.render("report.html", run=str(run), pictures=pictures, **values)
    checkpoint.write_whole(out, lambda path: path.write_text(html, encoding="utf-8"))


def require_finished(run: Path) -> None:
    """Raise ConfigError if a run has been begun and has no metrics yet."""
    if checkpoint.begun(run) and not (run / checkpoint.METRICS).exists():
        state = checkpoint.load(run / checkpoint.CHECKPOINT, NO_RUN, "RUN")
        raise ConfigError(
            f"RUN {run}: is not finished, but at step {state['step']} of {state['config']['steps']}; continue it with "
            "--resume"
        )


def _values(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the page shows; raises KeyError and the like where something is missing."""
    tables, data, config = results.tables(metrics), metrics["data"], metrics["config"]
    title, first = next(iter(tables.items()), ("", {}))
    before, trained = (list(first.values())[i] for i in (0, -1)) if first else ({}, {})
    headline = HEADLINE if first else ()
    return {
        "title": f"{metrics['method']}, {config['backbone']} on {data['name']}",
        "method": str(metrics["method"]),
        "loss": losses.title(config["loss"]),
        "note": str(metrics["backbone"]),
        "seed": int(metrics["seed"]),
        "steps": int(metrics["steps"]),
        "seconds": float(metrics["seconds"]),
        "names": {name: _name(name) for name in trained},
        "tables": tables,
        "not_tested": metrics.get("not_tested"),
        "headline": [(_name(name), title, before[name], trained[name]) for name in headline],
        "worse": [_name(name) for name in headline if trained[name] < before[name]],
        "settings": _settings(config),
        "data_name": str(data["name"]),
        "data": {
            name.replace("_", " "): f"{value:,}" for name, value in data.items() if name not in ("name", "credit")
        },
        "credit": list(data["credit"]),
        "machine": dict(metrics["machine"]),
    }


def _name(score: str) -> str:
    for begins, name in SCORES.items():
        score = score.replace(begins, name)
    return score


def _settings(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By the sections of --help."""
    sections: dict[str, dict[str, Any]] = {}
    section, left = OTHERS, dict(config)
    for field in fields(Config):
        section = field.metadata["group"] or section
        if field.name in left:
            sections.setdefault(section, {})[field.name.replace("_", "-")] = left.pop(field.name)
    if left:  # of another version
        sections[OTHERS] = left
    return sections
