"""Settings in a file of YAML, by the names of the command line: ``--config FILE``, and what a run writes of its own."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from .config import Config, ConfigError

RECIPE = "recipe"
OF_THE_MOMENT = {"resume", "overwrite"}
"""Said when a run is started, not kept."""
FLAGS = {f.name for f in fields(Config) if f.metadata["argument"].get("action", "").startswith("store_")}
"""Settings without a value: true, or left out."""
NAMES = {f.name for f in fields(Config)} - OF_THE_MOMENT | {RECIPE}


def words(path: Path) -> list[str]:
    """What a file says, as words of a command line.

    Raises:
        ConfigError: the file cannot be read, or has an unknown setting, or a value that no setting takes.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {' '.join(str(error).split())}") from error
    if settings is None:  # an empty file
        return []
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path}: must have lines such as 'batch_size: 64'")
    return [word for name, value in settings.items() for word in _words(path, name, value)]


def _words(path: Path, name: object, value: object) -> list[str]:
    field = str(name).replace("-", "_")
    argument = f"--{field.replace('_', '-')}"
    if field in OF_THE_MOMENT:
        raise ConfigError(f"--config {path}: {name} belongs on the command line")
    if field not in NAMES:
        raise ConfigError(f"--config {path}: there is no setting {name}; --help lists them")
    if value is None:  # the default
        return []
    if field in FLAGS:
        if not isinstance(value, bool):
            raise ConfigError(f"--config {path}: {name} must be true or false, got {value!r}")
        return [argument] * value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"--config {path}: {name} must be a number or a text, got {value!r}")
    return [f"{argument}={value}"]


def text(config: Config) -> str:
    """All settings that decide a run's result, as a file that ``words`` reads."""
    settings: dict[str, Any] = {name: value for name, value in config.settings().items() if value is not None}
    dumped: str = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return dumped
