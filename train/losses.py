"""The losses a run can train with, all of xbn_ext: which parameters each has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from xbn_ext.losses import LOSSES, PairLoss

RECIPE = {"contrastive": {"reduction": "avg_nonzero"}}
"""Defaults of a run that are not those of the loss's class."""


def defaults(name: str) -> dict[str, Any]:
    """A loss's parameters, and what each is if not given; with a distance, margins are others."""
    loss = LOSSES[name]()
    return {f.name: getattr(loss, f.name) for f in fields(loss)} | RECIPE.get(name, {})


PARAMETERS = tuple(dict.fromkeys(parameter for name in LOSSES for parameter in defaults(name)))
"""The parameters of all losses; those of one name share a setting."""


def make(name: str, given: Mapping[str, Any]) -> PairLoss:
    """A loss; parameters that are None are not given.

    Raises:
        ValueError: a parameter is not one of this loss, or has a value that the loss does not allow; starts with the
            parameter's name on the command line.
    """
    own = defaults(name)
    values = {parameter: value for parameter, value in given.items() if value is not None}
    for parameter, value in values.items():
        if parameter not in own:
            has = ", ".join(map(flag, own))
            raise ValueError(f"{flag(parameter)} {value}: --loss {name} has no such parameter, only {has}")
        if isinstance(value, str) and not isinstance(own[parameter], str):
            raise ValueError(f"{flag(parameter)} {value}: must be a number with --loss {name}")
    try:
        return LOSSES[name](**RECIPE.get(name, {}) | values)
    except ValueError as error:  # "temperature must be positive, got 0.0"
        parameter, _, wrong = str(error).partition(" ")
        raise ValueError(f"{flag(parameter)} {wrong}") from None


def about(parameter: str, text: str) -> str:
    """A parameter's help: the losses that have it, what it means, and its defaults."""
    found = {name: defaults(name)[parameter] for name in LOSSES if parameter in defaults(name)}
    standard = [str(value) for value in found.values() if value is not None]
    standard = standard[:1] if len({*standard}) == 1 else standard
    return f"{', '.join(found)}: {text} (default: {', '.join(standard)})"


def number_or_word(text: str) -> float | str:
    """A number where the text is one."""
    try:
        return float(text)
    except ValueError:
        return text


def flag(parameter: str) -> str:
    """A parameter's name on the command line."""
    return f"--{parameter.replace('_', '-')}"


def title(name: str) -> str:
    """What pictures and the terminal call a loss."""
    return f"{name.replace('_', '-')} loss"
