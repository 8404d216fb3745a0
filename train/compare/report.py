"""report.md, report.html and their pictures: what was found, in numbers and in words that follow from them."""

from __future__ import annotations

import html
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import markdown
import numpy as np
import torch

from xbn_ext import Contrastive

from .. import checkpoint
from ..config import Config
from ..results import machine as machine_of
from . import pictures
from .drift import AGES, PHASES, SHARED, WHOLE, staleness
from .findings import Findings, in_words, values_of
from .plan import CENTRED, TEST, VALIDATION, moves, titles, uncentred
from .statistics import CONFIDENCE, Estimate, corrected, difference, estimate, ratio
from .work import Workshop

STILL = ("batch", "xbm")
"""Methods that all others, except an oracle, are compared with."""
PICTURES = {"final": pictures.final, "map": pictures.lr_map, "drift": pictures.drift, "effects": pictures.effects}
WRITTEN = ("report.md", "report.html", *(f"{name}.png" for name in PICTURES))
STYLE = """body{max-width:62em;margin:2em auto;padding:0 1em;font:16px/1.5 system-ui,sans-serif;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}code{background:#f4f4f4;padding:.1em .3em}"""


def machine(workshop: Workshop) -> str:
    """What the runs are done on, and how."""
    found = machine_of(torch.device(workshop.device))
    device = "CPU" if workshop.device == "cpu" else found["device"]
    versions = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "torchvision", "faiss", "xbn_ext"))
    runs = f"{workshop.jobs} run{'s' * (workshop.jobs > 1)} at a time"
    return f"{device}, {runs}, threads of each: {workshop.threads}; {versions}"


def write(out: Path, findings: Findings) -> None:
    """Write the report and its pictures into ``out``.

    Raises:
        ConfigError: they cannot be written.
    """
    with checkpoint.writing(out):
        for name, draw in PICTURES.items():
            draw(out / f"{name}.png", findings)
        text = "\n\n".join(
            [*_opening(findings), *_final(findings), *_map(findings), *_drift(findings), *_effects(findings)]
        )
        for name, content in (("report.md", text + "\n"), ("report.html", page(text))):
            temporary = out / f".{name}"
            temporary.write_text(content, encoding="utf-8")
            os.replace(temporary, out / name)


def page(text: str) -> str:
    """The report in Markdown as a page of HTML."""
    body = markdown.markdown(text, extensions=["tables"])
    return (
        f"<!doctype html><meta charset=utf-8><title>What moment matching does</title><style>{STYLE}</style>\n{body}\n"
    )


def conclusions(findings: Findings) -> list[str]:
    """What the runs on the test classes show of MAP@R.

    Each method that moves its memory or centres its gradients is compared with those that do neither, at each method's
    own learning rate and at one for all. A comparison is decided by the paired interval of the difference, seed by
    seed, corrected by Bonferroni for the number of all these comparisons: see ``judgement``.
    """
    pairs, sentences = _pairs(findings), []
    for which, tested in findings.tested().items():
        found = {m: findings.estimate(runs).mean for m, runs in tested.items() if findings.broken(runs) < len(runs)}
        if found:
            best = max(found, key=found.__getitem__)
            sentences.append(f"{_at(findings, which)}: **{best}** is highest, MAP@R {findings.cell(tested[best])}.")
        else:
            sentences.append(f"{_at(findings, which)}: all runs broke down, no method is highest.")
        for method, other in pairs:
            if not found.keys() & {method, other}:
                sentences.append(f"{method} against {other}: all runs of both broke down.")
                continue
            gap = difference(findings.scores(tested[method]), findings.scores(tested[other]))
            marks = [f"; {name}{mark}" for name in (method, other) if (mark := findings.mark(tested[name]))]
            sentences.append(f"{method} against {other}: {judgement(gap, _comparisons(findings))}{''.join(marks)}.")
    return sentences


def _pairs(findings: Findings) -> list[tuple[str, str]]:
    """Each method that does something about staleness with each that does not."""
    methods = findings.plan.methods
    others = [method for method in methods if method not in STILL and uncentred(method) != "oracle"]
    return [(method, other) for method in others for other in STILL if other in methods]


def _comparisons(findings: Findings) -> int:
    return len(_pairs(findings)) * len(findings.tested())


def rule(comparisons: int) -> str:
    """How ``judgement`` decides."""
    return (
        f"Differences are taken seed by seed, ± is half of their {CONFIDENCE:.0%} interval, Student's. Significantly "
        f"different means that 0 is outside the interval corrected for the number of comparisons "
        f"below, {comparisons} (Bonferroni)."
    )


def judgement(gap: Estimate, comparisons: int) -> str:
    """Whether a difference, seed by seed, is one of ``comparisons`` that are significant, and the difference itself."""
    if gap.count < 2:
        return f"{gap.mean:+.2f} points; one seed shows no more"
    wide = corrected(gap, comparisons)
    verdict = "no significant difference"
    if wide.low > 0 or wide.high < 0:
        verdict = f"significantly different, {'higher' if gap.mean > 0 else 'lower'}"
    return f"{verdict}; seed by seed {gap.mean:+.2f} ± {gap.half:.2f} points, corrected ± {wide.half:.2f}"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count > 1)}"


def _at(findings: Findings, which: str) -> str:
    if which == "common":
        return f"All at learning rate {findings.plan.base.lr:g}"
    return "Each method at its own learning rate"


def _words(method: str, config: Config, findings: Findings) -> str:
    """The settings that were chosen, in this run's values."""
    names = findings.chosen[method]
    return ", ".join(f"{name.replace('_', ' ')} {getattr(config, name):g}" for name in names)


def _opening(findings: Findings) -> list[str]:
    plan, base = findings.plan, findings.plan.base
    counts = {part: sum(name.startswith(part) for name in findings.results) for part in (VALIDATION, TEST)}
    seconds = sum(result["seconds"] for result in findings.results.values())
    loss = base.pair_loss()
    reduction = f", {loss.reduction}" if isinstance(loss, Contrastive) else ""
    momentum = "; then ema's momentum" if "ema" in plan.methods else ""
    broken = sum(result["scores"] is None for result in findings.results.values())
    counted = " (a run that broke down counts as 0 %; numbers that it is in say so)" if broken else ""
    return [
        "# What moment matching does to a cross-batch memory",
        "\n".join(f"- **{method}**: {text}" for method, text in titles(plan.methods).items()),
        f"One budget for all: {base.steps:,} steps, the same batches in the same order. The learning rate of each "
        f"method is chosen from {', '.join(f'{lr:g}' for lr in plan.lrs)} by MAP@R on a quarter of the *training* "
        f"classes, held out for that ({_seeds(plan.map_seeds)}){momentum}. The test "
        f"classes are used once, with the chosen settings ({_seeds(plan.seeds)}; ± is half of the {CONFIDENCE:.0%} "
        "interval, Student's).",
        f"Data: {_plain(base.data)}. Network: {_plain(_networks(findings))}. Loss: {base.loss}{reduction}. Memory of "
        f"{base.memory_size:,}, batches of {base.batch_size}, unless stated otherwise.",
        _code(findings.command),
        f"{counts[VALIDATION]} + {counts[TEST]} runs, {seconds / 60:.0f} minutes of training in all; {broken} broke "
        f"down{counted}. {findings.machine}.",
        "## In short",
        *([rule(_comparisons(findings))] if _pairs(findings) else []),
        "\n".join(f"- {sentence}" for sentence in conclusions(findings)),
    ]


def _plain(text: str) -> str:
    """A text that Markdown and HTML leave as it is."""
    return re.sub(r"[\\`*\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", html.escape(text, quote=False))


def _code(text: str) -> str:
    """As code, between more backticks than the text has side by side."""
    most = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (most + 1), " " * (most > 0)
    return f"{fence}{space}{text}{space}{fence}"


def _networks(findings: Findings) -> str:
    """The network and the weights that it began from; more than one where a run has found other weights."""
    notes = {result.get("network", findings.plan.base.backbone) for result in findings.results.values()}
    return "; ".join(note.replace(": ", ", ", 1) for note in sorted(notes))


def _final(findings: Findings) -> list[str]:
    parts = ["## Test classes", "![scores on the test classes](final.png)"]
    recalls = findings.recalls()
    for which, tested in findings.tested().items():
        rows = [
            [
                method,
                _words(method, runs[0].config, findings),
                *(findings.cell(runs, name) for name in ("map@r", *recalls)),
            ]
            for method, runs in tested.items()
        ]
        header = ["method", "settings", "MAP@R", *(name.capitalize() for name in recalls)]
        parts += [f"{_at(findings, which)}:", _table(header, rows)]
    return [*parts, *_recovered(findings)]


def _recovered(findings: Findings) -> list[str]:
    """How much of what an oracle gains over a memory left alone each method does."""
    if not {"xbm", "oracle"} <= {*findings.plan.methods}:
        return []
    rows = []
    for which, tested in findings.tested().items():
        scores = {method: findings.scores(runs) for method, runs in tested.items()}
        gains = {method: np.subtract(own, scores["xbm"]).tolist() for method, own in scores.items() if method != "xbm"}
        above = np.mean(gains["oracle"]) > 0
        for method, gain in gains.items():
            runs = [*tested[method], *tested["xbm"]]
            found = ratio(gain, gains["oracle"]) if above else None
            mark = "" if found is None else findings.mark([*runs, *tested["oracle"]])
            gained = f"{estimate(gain)}{findings.mark(runs)}"
            rows.append([_at(findings, which), method, gained, f"{percent(found)}{mark}"])
    return [
        "What a method gains over xbm, and its part of what the oracle gains, which embeds all again before each "
        f"step (in brackets the {CONFIDENCE:.0%} interval, Fieller's, of both seed by seed; -: it has no bounds, or "
        "the oracle gains nothing):",
        _table(["", "method", "MAP@R over xbm", "part of the oracle's"], rows),
    ]


def percent(found: Estimate | None) -> str:
    """A part with its interval, which is not symmetrical."""
    if found is None:
        return "-"
    return f"{100 * found.mean:.0f} % ({100 * found.low:.0f} to {100 * found.high:.0f})"


def _map(findings: Findings) -> list[str]:
    plan = findings.plan
    rows = [
        [
            method,
            "-" if method == "batch" else f"{memory_size:,}",
            *(findings.cell(plan.many(VALIDATION, method, lr=lr, memory_size=memory_size)) for lr in plan.lrs),
        ]
        for method in plan.methods
        for memory_size in plan.memory_sizes_of(method)
    ]
    return [
        "## Learning rate and memory size",
        f"MAP@R on the held-out training classes, means of {_seeds(plan.map_seeds)}:",
        _table(["method", "memory", *(f"lr {lr:g}" for lr in plan.lrs)], rows),
        *_gains(findings),
        "![MAP@R against learning rate](map.png)",
    ]


def _gains(findings: Findings) -> list[str]:
    """Of the same runs, with the base's memory: each method against those that do nothing about staleness, and what
    centring and moving add to one another, seed by seed."""
    plan = findings.plan
    rows = []
    for other, method in itertools.product(plan.methods, plan.methods):
        if not _adds(method, other):
            continue
        runs = [(plan.many(VALIDATION, method, lr=lr), plan.many(VALIDATION, other, lr=lr)) for lr in plan.lrs]
        gaps = [
            f"{difference(findings.scores(ours), findings.scores(theirs))}{findings.mark([*ours, *theirs])}"
            for ours, theirs in runs
        ]
        rows.append([f"{method} over {other}", *gaps])
    if not rows:
        return []
    return [
        f"Differences of these, seed by seed, with a memory of {plan.base.memory_size:,}:",
        _table(["", *(f"lr {lr:g}" for lr in plan.lrs)], rows),
    ]


def _adds(method: str, other: str) -> bool:
    """Whether a method does something about staleness that the other does not, and all that the other does."""
    if other in STILL:
        return method not in STILL
    return method.endswith(CENTRED) and method != other and other in (uncentred(method), f"xbm{CENTRED}")


def _drift(findings: Findings) -> list[str]:
    if findings.plan.methods == ("batch",):  # it has no memory
        return []
    of_oracle = ""
    if "oracle" in findings.plan.methods:
        of_oracle = " The oracle's rows are a step old, and were embedded beside other images."
    return [
        "## Drift",
        "After a step the current network embeds images of past batches again, in training mode. A cell compares the "
        "memory with that: the mean cosine distance of the row as it was stored → as it is in the memory (change), by "
        "the age of the row, all at one learning rate." + of_oracle,
        _of_drift(findings, WHOLE),
        "The part of it that the rows of a batch have in common. Errors that point the same way add up in a gradient, "
        "others cancel out:",
        _of_drift(findings, SHARED),
        "![distance to the rows embedded again](drift.png)",
    ]


def _of_drift(findings: Findings, names: tuple[str, str]) -> str:
    plan = findings.plan
    rows = []
    for method in (method for method in plan.methods if method != "batch"):
        results = findings.of(plan.common(findings.chosen)[method])
        for phase, when in PHASES.items():
            cells = []
            for age in AGES.values():
                found = staleness(results, plan.base, when, age, names)
                if found is None:
                    cells.append("-")
                else:
                    numbers = f"{found.uncorrected.mean:.3f} → {found.in_memory.mean:.3f}"
                    change = "-" if found.removed is None else f"{-found.removed:+.0f} %"
                    cells.append(numbers if not moves(method) else f"{numbers} ({change})")
            rows.append([method, phase, *cells])
    return _table(["method", "training", *AGES], rows)


def _effects(findings: Findings) -> list[str]:
    if not findings.effects():
        return []
    parts = [
        "## Other settings",
        f"One at a time, at learning rate {findings.plan.base.lr:g} for all (noise and momentum: at the method's own); "
        f"MAP@R on the held-out training classes, means of {_seeds(findings.plan.map_seeds)}:",
    ]
    for name, entries in findings.effects().items():
        values = values_of(entries)
        methods = list(dict.fromkeys(method for method, *_ in entries))
        cells = {(method, value): findings.cell(runs) for method, value, runs in entries}
        header = [pictures.EFFECTS[name], *map(in_words, values)]
        parts.append(_table(header, [[method, *(cells[method, value] for value in values)] for method in methods]))
    return [*parts, "![MAP@R against other settings](effects.png)"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
