"""One thread (two on busy cores can be ten times slower), and every test on every implementation of the ops.

A test that takes `ops` and `device` runs on the CPU kernels and on the CUDA kernels: on a GPU where there is one, else
executed on the CPU (`emu`). Tests of the loss do so for all of its ways on a GPU. `dtype` goes with them.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TSAN_OPTIONS", "atexit_sleep_ms=0")  # a second for each program, for threads that still run

import importlib
import re
import shutil
import zlib
from types import SimpleNamespace

import pytest
import torch

import xbn_ext

torch.set_num_threads(1)

HAS_GPU = torch.cuda.is_available() and bool(xbn_ext.build_info()["cuda"])
HAS_EMULATOR = shutil.which("g++") is not None and not HAS_GPU  # no need for it beside the real thing
IMPLEMENTATIONS = ["cpu", *(["emu"] if HAS_EMULATOR else []), *(["cuda"] if HAS_GPU else [])]
MANY_SETS = 40  # of parameters of one test
DTYPES = {"f32": torch.float32, "f64": torch.float64}


@pytest.hookimpl(trylast=True)  # -k and -m have chosen
def pytest_collection_modifyitems(config, items):
    kept = thinned([item for item in items if goes_this_way(item)])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = dealt([item for item in items if item in kept], int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))


def dealt(items, workers):
    """The items in an order in which every worker begins with CUDA kernels under sanitizers, minutes each, side by
    side: in the end nothing waits for them. `--dist worksteal` gives each worker a run of the items to begin with."""
    long = [item for item in items if item.originalname == "test_cuda_kernels"]
    others = [item for item in items if item not in long]
    order = []
    for worker in range(workers):
        its_own = long[worker::workers]
        share = (len(items) - len(order)) // (workers - worker)
        rest = max(share - len(its_own), 0)
        order += its_own + others[:rest]
        del others[:rest]
    return order


def parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def goes_this_way(item):
    """False where the loss would silently go another way."""
    params = parameters(item)
    path = params.get("implementation", ("", ""))[1]
    if path in ("tensor", "simt") and getattr(params.get("loss"), "kind", None) == "triplet_all":
        return False
    return path != "tensor" or (params.get("D", 4) % 4 == 0 and params.get("shape", (4,))[-1] % 4 == 0)


def thinned(items):
    """The items, as a set. Where a test has many sets of parameters, each is executed on the CPU by one of the ways and
    dtypes only, drawn by its name: the fuzz of test_sanitizers takes all ways, a GPU all of both."""
    ways = {}  # by test and set of parameters
    for item in items:
        name, path = parameters(item).get("implementation", ("", ""))
        if name == "emu" and path != "auto":
            one_set = re.sub(rf"{name}-{path}(-f..)?", "", item.nodeid)
            ways.setdefault(item.nodeid.partition("[")[0], {}).setdefault(one_set, []).append(item)
    left_out = set()
    for sets in ways.values():
        for one_set, its_items in sets.items() if len(sets) > MANY_SETS else ():
            left_out.update(its_items)
            left_out.remove(its_items[zlib.crc32(one_set.encode()) % len(its_items)])
    return {item for item in items if item not in left_out}


def pytest_generate_tests(metafunc):
    has_dtype = "dtype" in metafunc.fixturenames
    if "implementation" not in metafunc.fixturenames:
        if has_dtype:
            metafunc.parametrize("dtype", DTYPES.values(), ids=DTYPES)
        return
    all_ways = metafunc.module.__name__ in ("test_memory_loss", "test_losses")
    cases = {}
    for name in IMPLEMENTATIONS:
        if name == "emu" and metafunc.module.__name__ == "test_long_run":
            continue  # minutes
        for path in ["tensor", "simt", "composite"] if all_ways and name != "cpu" else ["auto"]:
            for dtype in DTYPES if has_dtype else ["f32"]:
                if path in ("tensor", "simt") and dtype == "f64":
                    continue  # float32 only
                words = [name, *([path] if path != "auto" else []), *([dtype] if has_dtype else [])]
                cases["-".join(words)] = ((name, path), DTYPES[dtype])
    if has_dtype:
        metafunc.parametrize("implementation, dtype", cases.values(), ids=cases, indirect=["implementation"])
    else:
        metafunc.parametrize("implementation", [case[0] for case in cases.values()], ids=cases, indirect=True)


@pytest.fixture
def implementation(request, monkeypatch):
    name, path = request.param
    library = "emulated" if name == "emu" else "xbn_ext.ops"
    set_backend = torch.ops.xbn_ext.set_cuda_backend
    module = importlib.import_module(library)  # builds the emulated kernels on first use
    if name == "emu":
        set_backend = torch.ops.xbn_emu.set_cuda_backend
    monkeypatch.setattr("xbn_ext.memory.ops", module)  # the same for CrossBatchMemory
    before = set_backend(path)
    yield SimpleNamespace(ops=module, device=torch.device("cuda" if name == "cuda" else "cpu"), name=name, path=path)
    set_backend(before)


@pytest.fixture
def ops(implementation):
    """The functions of `xbn_ext.ops`."""
    return implementation.ops


@pytest.fixture
def device(implementation):
    """Where the tensors for `ops` must be."""
    return implementation.device


@pytest.fixture
def width(implementation):
    """A number of columns that fills no tile; of which the tensor cores take multiples of four only."""
    return 36 if implementation.path == "tensor" else 33


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def emoji_cache(tmp_path_factory):
    """A cache folder that holds a few classes of real emoji."""
    from train.data import load, npm

    path = tmp_path_factory.mktemp("emoji")
    try:
        load("emoji", cache_dir=path, max_classes=40)
    except npm.RegistryError as error:
        pytest.skip(f"the npm registry cannot be reached: {error}")
    return path


@pytest.fixture(scope="session")
def few_emoji(emoji_cache):
    """40 classes of real emoji."""
    from train.data import load

    return load("emoji", cache_dir=emoji_cache, max_classes=40)
