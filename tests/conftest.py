"""One thread (two on busy cores can be ten times slower), and every test on every implementation of the ops.

A test that takes `ops` and `device` runs on the CPU kernels, on what there is without the compiled library (`plain`),
and on the CUDA kernels: on a GPU where there is one, else executed on the CPU (`emu`). Tests of the loss do so for all
of its ways on a GPU. `dtype` goes with them.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TSAN_OPTIONS", "atexit_sleep_ms=0")  # a second for each program, for threads that still run

import fcntl
import gc
import importlib
import shutil
from types import SimpleNamespace

import pytest
import torch
from selection import dealt, select

import xbn_ext
from xbn_ext.options import WAYS_FOR_TESTS

torch.set_num_threads(1)

HAS_GPU = torch.cuda.is_available() and bool(xbn_ext.build_info()["cuda"])
HAS_EMULATOR = shutil.which("g++") is not None and not HAS_GPU  # no need for it where there is a GPU
HAS_KERNELS = xbn_ext.build_info()["native"]
IMPLEMENTATIONS = [
    "cpu",
    *(["plain"] if HAS_KERNELS else []),  # else that is what runs on the CPU
    *(["plain-gpu"] if torch.cuda.is_available() else []),
    *(["emu"] if HAS_EMULATOR else []),
    *(["cuda"] if HAS_GPU else []),
]
DTYPES = {"f32": torch.float32, "f64": torch.float64}
FORCED_WAYS = [way for way in WAYS_FOR_TESTS if way != "auto"]
WAYS = {  # of the loss on a GPU, by how the name of a test module begins
    "test_losses_": [way for way in FORCED_WAYS if way not in ("screen", "pairs")],  # which few losses take
    "test_memory_loss": FORCED_WAYS,
}


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run what is marked long")


@pytest.hookimpl(wrapper=True)  # around -k and -m
def pytest_collection_modifyitems(config, items):
    collected = list(items)
    every = config.getoption("all") or "long" in config.getoption("markexpr")  # asked for by -m long
    items[:] = select(config, items, every)
    kept = set(items)
    config.hook.pytest_deselected(items=[item for item in collected if item not in kept])
    yield
    items[:] = dealt(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))


def pytest_collection_finish():
    gc.freeze()  # a million objects of torch's and pytest's: the benchmarks collect garbage before every round


def only(**names):
    """Restricts a test: `only(dtype="f64")`, `only(ways=["composite"])` of a GPU's ways, and `only(compiled=True)` to
    ops of torch, without the emulator's kernels and plain functions."""

    def decorate(test):
        test.only = names
        return test

    return decorate


def pytest_generate_tests(metafunc):
    has_dtype = "dtype" in metafunc.fixturenames
    wanted = getattr(metafunc.function, "only", {})
    dtypes = {name: dtype for name, dtype in DTYPES.items() if name == wanted.get("dtype", name)}
    if "implementation" not in metafunc.fixturenames:
        if has_dtype:
            metafunc.parametrize("dtype", dtypes.values(), ids=dtypes)
        return
    module = metafunc.module.__name__
    ways = next((ways for start, ways in WAYS.items() if module.startswith(start)), ["auto"])
    cases = {}
    for name in IMPLEMENTATIONS:
        if name not in ("cpu", "cuda") and "compiled" in wanted:
            continue
        for way in ways if name in ("emu", "cuda") else ["auto"]:
            if way not in ("auto", *wanted.get("ways", [way])):
                continue
            for dtype in dtypes if has_dtype else ["f32"]:
                if way not in ("auto", "composite") and dtype == "f64":
                    continue  # float32 only
                words = [name, *([way] if way != "auto" else []), *([dtype] if has_dtype else [])]
                cases["-".join(words)] = ((name, way), DTYPES[dtype])
    if has_dtype:
        metafunc.parametrize("implementation, dtype", cases.values(), ids=cases, indirect=["implementation"])
    else:
        metafunc.parametrize("implementation", [case[0] for case in cases.values()], ids=cases, indirect=True)


@pytest.fixture
def implementation(request, monkeypatch):
    name, way = request.param
    namespace = torch.ops.xbn_ext
    set_way = namespace.set_loss_way
    if name == "emu":
        namespace = importlib.import_module("emulated").ops  # builds the emulated kernels on first use
        set_way = namespace.set_loss_way
    if name in ("plain", "plain-gpu"):
        namespace = importlib.import_module("xbn_ext.plain")
        monkeypatch.setattr("xbn_ext.plain.chunks.CHUNK_ON_CPU", 1 << 13)  # so that a small bank has several chunks
    before = set_way(way)
    with xbn_ext.ops.over(namespace):
        yield SimpleNamespace(
            ops=xbn_ext.ops,
            device=torch.device("cuda" if name in ("cuda", "plain-gpu") else "cpu"),
            name=name,
            way=way,
        )
    set_way(before)


@pytest.fixture
def ops(implementation):
    """`xbn_ext.ops`, over the implementation under test."""
    return implementation.ops


@pytest.fixture
def device(implementation):
    """Where the tensors for `ops` must be."""
    return implementation.device


@pytest.fixture
def width(implementation):
    """A number of columns that fills no tile; the tensor cores take multiples of four only."""
    return 36 if implementation.way in ("tensor", "screen", "halves", "pairs") else 33


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def in_this_process(monkeypatch):
    """All tables of the benchmarks without the time to start processes and to measure the machine; the second shape of
    the memory table as tiny as the first."""
    from benchmark_cases import stay_in_this_process

    stay_in_this_process(monkeypatch)


@pytest.fixture(scope="session")
def of_this_run(tmp_path_factory):
    """A folder for what is made once for all processes; who makes it locks a file there."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def trusted_kernels(of_this_run):
    """Objects by g++, without sanitizers: of the CPU kernels for the baseline alone, and what stands in for cuBLAS."""
    import fuzzers

    folder = of_this_run / "trusted"
    with open(of_this_run / "compiling", "w") as compiling:
        fcntl.flock(compiling, fcntl.LOCK_EX)
        if not folder.exists():
            part = of_this_run / "trusted.part"
            part.mkdir(exist_ok=True)
            fuzzers.compile(part, "g++", *fuzzers.TRUSTED)
            part.rename(folder)
    return sorted(folder.glob("*.o"))


@pytest.fixture(scope="session")
def emoji_cache(of_this_run):
    """A cache folder that holds a few classes of real emoji, fetched once for all processes."""
    from train.data import load, npm

    with open(of_this_run / "fetching", "w") as fetching:
        fcntl.flock(fetching, fcntl.LOCK_EX)
        try:
            load("emoji", cache_dir=of_this_run / "emoji", max_classes=40)
        except npm.RegistryError as error:
            pytest.skip(f"the npm registry cannot be reached: {error}")
    return of_this_run / "emoji"


@pytest.fixture(scope="session")
def few_emoji(emoji_cache):
    """40 classes of real emoji."""
    from train.data import load

    return load("emoji", cache_dir=emoji_cache, max_classes=40)


@pytest.fixture(params=[1 << 20, 1], ids=["one chunk", "chunks"])
def few_at_a_time(request, monkeypatch):
    """Plain PyTorch takes a memory at once, or 13 rows at a time."""
    monkeypatch.setattr("xbn_ext.plain.chunks.CHUNK_ON_CPU", request.param)
    monkeypatch.setattr("xbn_ext.plain.chunks.FEWEST_ROWS", 13)


@pytest.fixture
def one_thread():
    """torch computes in the thread of the test."""
    torch.set_num_threads(1)


@pytest.fixture
def no_pictures(monkeypatch):
    """A run draws a byte: real pictures take seconds."""
    from train import results

    for picture in ("curves", "neighbours"):
        monkeypatch.setattr(results.pictures, picture, lambda path, *_: path.write_bytes(b"."))


@pytest.fixture
def tiny(no_pictures, monkeypatch):
    """Makes resnet18 tiny, without pictures."""
    from tiny_runs import make_tiny

    make_tiny(monkeypatch)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The folder of a small data set, of polygons."""
    from miniatures import make_shapes

    return make_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """The folder of a finished run on it, of three steps."""
    from miniatures import make_run

    return make_run(shapes, tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def here(trained, shapes, tmp_path, monkeypatch):
    """The current folder, with a copy of the run and of the pictures: run, pictures."""
    shutil.copytree(shapes, tmp_path / "pictures")
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path
