"""``python -m train export RUN``: the network of a run in forms that need no code of ours."""

from __future__ import annotations

import argparse
import io
import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import save

from . import augment, checkpoint, outputs, terminal
from .about import folder_path
from .config import ConfigError
from .program import called
from .trained import Trained, add_weights_of

PROGRAM, WEIGHTS, ABOUT = checkpoint.EXPORTED
INPUT = "uint8 [B, 3, S, S], RGB"
OUTPUT = "float32 [B, D], of unit length"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    terminal.prepare()
    parser = argparse.ArgumentParser(
        prog=called("export"),
        description=f"Write the network of a run as {PROGRAM}, which torch.export.load reads, its weights as "
        f"{WEIGHTS}, and {ABOUT}, which says what it takes and gives.",
    )
    parser.add_argument("run", type=folder_path, help="the --out of a run")
    parser.add_argument("--out", type=folder_path, help="where to (default: the folder of the run)")
    add_weights_of(parser)
    given = parser.parse_args(arguments)
    try:
        export(given.run, given.out or given.run, given.weights_of)
    except ConfigError as error:
        return terminal.refuse("export", error)
    terminal.say(f"{given.out or given.run}: {PROGRAM}, {WEIGHTS}, {ABOUT}")
    return 0


def export(run: Path, out: Path, weights_of: str | None = None) -> None:
    """Write the three files.

    The program normalises pixels itself and computes in float32. A picture is given to it as a test of the run saw it:
    its short side scaled to ``resize`` pixels by ``interpolation``, with antialiasing, and then the middle
    ``image_size`` of either side.

    Raises:
        ConfigError: there is no such run, torch cannot export its network, or the folder cannot be written; or that
            would replace what is not of this command.
    """
    files = [out / name for name in checkpoint.EXPORTED]
    outputs.require_own(out, files, out / ABOUT, {"input": str, "output": str, "run": str}, "export")
    trained = Trained(run, weights_of)
    settings = trained.settings
    network = trained.digest()
    trained.network.precision = torch.float32
    example = torch.zeros(2, 3, settings.image_size, settings.image_size, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    try:
        program = torch.export.export(trained, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # of many kinds
        reason = f"torch.export cannot take its network, {settings.backbone} ({checkpoint.why(error)})"
        raise ConfigError(f"RUN {run}: {reason}") from error
    with checkpoint.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    # Copies: some networks use a tensor in two places.
    weights = {name: tensor.clone().contiguous() for name, tensor in trained.network.state_dict().items()}
    about = {
        "input": INPUT,
        "output": OUTPUT,
        "image_size": settings.image_size,
        "resize": augment.short_side(settings.image_size, settings.augment),
        "interpolation": settings.interpolation,
        "antialias": True,
        "embedding_dim": settings.embedding_dim,
        "run": str(run),
        "step": trained.step,
        "network": network,
        "settings": settings.settings(),
    }
    metadata = {name: json.dumps(value) for name, value in about.items()}
    checkpoint.write_together(
        {
            out / ABOUT: lambda path: path.write_text(checkpoint.json_text(about)),
            out / PROGRAM: lambda path: _save(path, program),
            out / WEIGHTS: lambda path: path.write_bytes(save(weights, metadata)),
        }
    )


def _save(path: Path, program: torch.export.ExportedProgram) -> None:
    content = io.BytesIO()  # of a file that is full, torch's writer ends the process
    with warnings.catch_warnings():
        # Of a constant that is a view; on CPUs it is whole.
        warnings.filterwarnings("ignore", message="No complete tensor found")
        torch.export.save(program, content)
    path.write_bytes(content.getbuffer())
