"""What emoji are called in some hundred languages, from Unicode's CLDR (npm package `cldr-annotations-full`)."""

from __future__ import annotations

import json
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from train.data import cache, emoji_names, npm

PACKAGE, VERSION = "cldr-annotations-full", "48.2.0"


class Encoder(nn.EmbeddingBag):
    """Names to embeddings [B, size]: the mean over a name's runs of one to four letters. Related languages share
    many of these."""

    def __init__(self, size: int, buckets: int = 1 << 14) -> None:
        super().__init__(buckets, size)

    def forward(self, names: list[str]) -> Tensor:
        texts = [f" {name.lower()} " for name in names]
        runs = [[text[i : i + n] for n in (1, 2, 3, 4) for i in range(len(text) - n + 1)] for text in texts]
        numbers = [zlib.crc32(run.encode()) % self.num_embeddings for bag in runs for run in bag]
        starts = torch.tensor([0, *map(len, runs[:-1])]).cumsum(0)
        return super().forward(torch.tensor(numbers), starts)


def load(languages: Sequence[str]) -> dict[str, dict[str, str]]:
    """{language: {emoji: name}}; an emoji is its code points, such as "1f63a", as in `train.data.emoji.code_points`.

    Raises:
        ValueError: names the languages that CLDR does not have.
        train.data.DataError: the package cannot be fetched.
    """
    found = {}
    with tarfile.open(_archive()) as archive:
        for member in archive:
            _, *folders, file = Path(member.name).parts
            if file == "annotations.json" and folders[-1] in languages:
                content = archive.extractfile(member)
                assert content is not None
                entries = json.load(content)["annotations"].get("annotations", {})
                found[folders[-1]] = {_key(it): entry["tts"][0] for it, entry in entries.items() if "tts" in entry}
    absent = sorted(language for language in set(languages) if not found.get(language))
    if absent:
        raise ValueError(f"languages: {PACKAGE} {VERSION} has no {', '.join(absent)}")
    return {language: found[language] for language in languages}


def _key(emoji: str) -> str:
    return emoji_names.code_points("-".join(f"{ord(character):x}" for character in emoji))


def _archive() -> Path:
    """The package as npm packs it, fetched once."""
    folder = cache.folder(None)
    kept = folder / f"{PACKAGE}-{VERSION}.tgz"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:  # renamed when it is whole
            npm.pack([f"{PACKAGE}@{VERSION}"], Path(new))[0].replace(kept)
    return kept
