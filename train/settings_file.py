"""Settings in a file of YAML, by the names of the command line: ``--config FILE``, and what a run writes of its own."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from .config import Config, ConfigError

RECIPE = "recipe"
SCORED = "eval_every"
OF_THE_MOMENT = {"resume", "overwrite"}
"""Said when a run is started, not kept."""
FLAGS = {f.name: f.default is True for f in fields(Config) if "action" in f.metadata["argument"]}
"""Settings that are true or false, on the command line words without a value: whether they are on by default."""
NAMES = {f.name for f in fields(Config)} - OF_THE_MOMENT | {RECIPE}


def words(path: Path) -> list[str]:
    """What a file says, as words of a command line.

    Raises:
        ConfigError: the file cannot be read, or has an unknown setting, or a value that no setting takes.
    """
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    # ValueError: no UTF-8. KeyError: no word for true or false after `!!bool`.
    except (OSError, ValueError, KeyError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {' '.join(str(error).split())}") from error
    if settings is None:  # an empty file
        return []
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path}: must have lines such as 'batch_size: 64'")
    twice = {a for a in settings for b in settings if a is not b and _field(a) == _field(b)}
    if twice:
        raise ConfigError(f"--config {path}: {' and '.join(map(str, twice))} are one setting")
    return [word for name, value in settings.items() for word in _words(path, name, value)]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses a name that is there twice, and leaves numbers and dates as they are written: 1.10 may be a folder."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(problem=f"{twice} is there twice")
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


for _kind in ("int", "float", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", yaml.SafeLoader.construct_yaml_str)


def _field(name: object) -> str:
    return str(name).replace("-", "_")


def _words(path: Path, name: object, value: object) -> list[str]:
    field = _field(name)
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
        no = [f"--no-{argument[2:]}"] if FLAGS[field] else []
        return [argument] if value else no
    if not isinstance(value, str):
        raise ConfigError(f"--config {path}: {name} must be a number or a text, got {value!r}")
    return [f"{argument}={value}"]


def text(config: Config) -> str:
    """All settings that decide a run's result, and when it is scored, as a file that ``words`` reads."""
    return _dumped(config.settings() | {SCORED: config.eval_every})


def is_of(content: str, settings: dict[str, Any]) -> bool:
    """Whether a run that has stored these settings has written that; it may change when it is scored."""
    its = _dumped(settings)
    rest = content.removeprefix(its)
    return content.startswith(its) and re.fullmatch(rf"({SCORED}: \d+\n)?", rest) is not None


def _dumped(settings: dict[str, Any]) -> str:
    given = {name: value for name, value in settings.items() if value is not None}
    dumped: str = yaml.dump(given, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return dumped


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes what has characters that cannot be seen: some of them would be read as the end of a line."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_str)
