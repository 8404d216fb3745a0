"""The command line of a run: an argument for each setting, and recipes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from . import losses, place, recipes, settings_file
from .about import file_path
from .config import Config, ConfigError
from .program import called
from .terminal import printable

DESCRIPTION = (
    "Train an image embedding against a cross-batch memory and say how good it became. '{program} COMMAND', with the "
    "COMMAND embed, search, export or report, uses what was trained; compare trains with each method. --help of each "
    "says how."
)


class _Formatter(argparse.HelpFormatter):
    """Appends each argument's default, where the text does not already say it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = "default" in text or any(action.default is empty for empty in (None, False, argparse.SUPPRESS))
        return text if silent else f"{text} (default: %(default)s)"


def parse(arguments: Sequence[str] | None = None, *, allow_abbrev: bool = True) -> Config:
    """The command line as a Config; exits with a usage message that names the argument at fault.

    Args:
        arguments: the words of the command line; None: those of this process.
        allow_abbrev: arguments may be shortened.
    """
    parser = argparse.ArgumentParser(
        called(),
        description=DESCRIPTION.format(program=called()),
        formatter_class=_Formatter,
        allow_abbrev=allow_abbrev,
    )
    parser.add_argument(
        "--recipe",
        choices=recipes.NAMES,
        help="settings for a data set, which other arguments override",
    )
    parser.add_argument(
        "--config",
        type=file_path,
        metavar="FILE",
        help="settings in YAML, which other arguments override, such as the config.yaml of another run",
    )
    group: argparse._ActionsContainer = parser
    for f in fields(Config):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        argument = dict(f.metadata["argument"])
        if "action" not in argument:
            argument.setdefault("type", type(f.default))
        if argument.get("type") in (int, float) and "choices" not in argument:
            argument.setdefault("metavar", "N" if argument["type"] is int else "X")
        group.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, help=f.metadata["help"], **argument)
    try:
        file = parser.parse_args(arguments).config
        if file is not None:
            arguments = _with_file(parser, file, sys.argv[1:] if arguments is None else arguments)
        values = vars(_with_recipe(parser, arguments))
        config = Config(**{f.name: values[f.name] for f in fields(Config)})
        if file is not None:
            place.require_kept(config, file)
        return config
    except ConfigError as error:
        parser.error(printable(str(error)))


def _with_file(parser: argparse.ArgumentParser, file: Path, arguments: Sequence[str]) -> list[str]:
    """The command line after what a file says: without the parameters of a loss, if the file names that loss, or its
    distance, and the command line another. A loss that is named without a distance is of cosine similarity."""
    words = settings_file.words(file)
    of_file, given = parser.parse_args(words), parser.parse_args([*words, *arguments])
    says_loss, says_distance = (any(w.startswith(f"--{name}=") for w in words) for name in ("loss", "distance"))
    other_distance = (of_file.distance or "cosine") != (given.distance or "cosine")
    if (says_loss and of_file.loss != given.loss) or ((says_loss or says_distance) and other_distance):
        of_loss = tuple(map(losses.flag, losses.PARAMETERS))
        words = [word for word in words if word.partition("=")[0] not in of_loss]
    return [*words, *arguments]


def _with_recipe(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, what it does not say from the recipe that it names."""
    given = parser.parse_args(arguments)
    if given.recipe is None:
        return given
    recipe = recipes.load(given.recipe)
    parser.set_defaults(**recipe)
    given = parser.parse_args(arguments)
    of_recipe = recipe["loss"], recipe["distance"]
    if (given.loss, given.distance) != of_recipe:  # its parameters are not those of the recipe's loss
        parser.set_defaults(**dict.fromkeys(losses.PARAMETERS))
        given = parser.parse_args(arguments)
    if given.data == f"{given.recipe}:{recipes.PLACE}":
        parser.error(
            f"--recipe {given.recipe} needs --data {given.data}, {recipes.PLACE} being your copy of the data set"
        )
    return given
