"""Which library computes: the compiled one, or none. Each in a Python of its own, as `import xbn_ext` decides it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xbn_ext

ROOT = Path(__file__).parent.parent
OF_OPS = {"test_memory_loss.py", "test_memory_sums.py"}
OF_THE_MEMORY = sorted({path.name for path in Path(__file__).parent.glob("test_memory_*.py")} - OF_OPS)
OF_ITS_STATE = ["test_state.py", "test_state_loading.py", "test_state_wrappers.py"]
TRAIN = """
import torch
import xbn_ext

def train(steps, state=None):
    torch.manual_seed(0)
    criterion = xbn_ext.CrossBatchMemory(xbn_ext.SupCon(), 8, 64, memory_dtype=torch.float64)
    if state is not None:
        criterion.load_state_dict(state)
    x, labels = torch.randn(12, 16, 8, dtype=torch.float64), torch.randint(4, (12, 16))
    values = []
    for i in steps:
        z = x[i].clone().requires_grad_()
        value = criterion(z, labels[i])
        value.backward()
        values += [value.detach(), z.grad]
    return criterion.state_dict(), values
"""
TRAIN_IN_PLAIN = (
    TRAIN
    + """
import sys
native = torch.load(sys.argv[1])
torch.save((train(range(6)), train(range(6, 12), native)), sys.argv[1])
info = xbn_ext.build_info()
print(info["native"], info["cuda"], info["cpu_isa"], info["paths"]["cpu"].name, xbn_ext.path_of("hpu").name)
"""
)
IMPORT = """
import os, sys, warnings
from pathlib import Path
folder = Path(sys.argv[1])
def attempt(wanted):
    for name in [name for name in sys.modules if name.partition(".")[0] == "xbn_ext"]:
        del sys.modules[name]
    os.environ["XBN_NATIVE"] = wanted
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            import xbn_ext
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return f"{xbn_ext.build_info()['native']} {[str(w.message) for w in caught if w.category is RuntimeWarning]}"
print(attempt("yes"))
print(attempt("1"))
(folder / "_C.cpython-27-x86_64-linux-gnu.so").touch()
print(attempt("auto"))
(folder / "_C.cpython-27-x86_64-linux-gnu.so").unlink()
(folder / "_C.abi3.so").write_bytes(b"no library")
print(attempt(""))
print(attempt("1"))
(folder / "_C.abi3.so").unlink()
print(attempt(""))
"""
STEP = """
import sys, torch, xbn_ext
criterion = xbn_ext.CrossBatchMemory(xbn_ext.SupCon(), 8, 64)
for _ in range(2):
    criterion(torch.randn(6, 8, requires_grad=True), torch.arange(6) % 2).backward()
print([name for name in ("torch._dynamo", "torch._inductor", "sympy", "torchvision", "scipy") if name in sys.modules])
"""


def python(code, *arguments, path=ROOT, **environ):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XBN_", "PYTHONWARNINGS"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=path, capture_output=True, text=True, env=kept | environ
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines(), done.stderr


@pytest.mark.long
@pytest.mark.skipif(not xbn_ext.build_info()["native"], reason="there is no library to compare with")
def test_a_run_goes_on_with_the_library_and_without(tmp_path):
    """It says so once, and a state that one has saved the other loads."""
    here = {}
    exec(TRAIN, here)
    file = tmp_path / "state"
    middle, first = here["train"](range(6))
    end, second = here["train"](range(6, 12), middle)
    torch.save(middle, file)
    [built], said = python(TRAIN_IN_PLAIN, file, XBN_NATIVE="0")
    assert built == "False [] none plain plain"
    assert said.count("xbn_ext runs without its compiled library") == 1 and said.startswith(
        "<string>:3: RuntimeWarning"
    )
    assert "unset XBN_NATIVE to have the kernels" in said
    (plain_middle, plain_first), (plain_end, plain_second) = torch.load(file)
    assert_same([*first, *middle.values()], [*plain_first, *plain_middle.values()])
    assert_same([*second, *end.values()], [*plain_second, *plain_end.values()])
    end_from_plain, second_from_plain = here["train"](range(6, 12), plain_middle)
    assert_same([*second, *end.values()], [*second_from_plain, *end_from_plain.values()])


def assert_same(tensors, others):
    for one, other in zip(tensors, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.long
def test_a_library_that_is_missing_or_does_not_load(tmp_path):
    package = tmp_path / "xbn_ext"
    shutil.copytree(ROOT / "xbn_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    said, _ = python(IMPORT, package, path=tmp_path)
    unknown, insisted, of_another_python, broken, broken_and_insisted, missing = said
    assert unknown == "ValueError: XBN_NATIVE must be 0, 1 or auto, got 'yes'"
    assert insisted.startswith("ImportError: XBN_NATIVE=1, but xbn_ext has no compiled library here: install a wheel")
    assert of_another_python.startswith(
        "ImportError: the compiled library of xbn_ext, _C.cpython-27-x86_64-linux-gnu.so, is for another Python"
    )
    for error in (broken, broken_and_insisted):
        assert (
            error.startswith("ImportError: the compiled library of xbn_ext does not load: ") and "_C.abi3.so" in error
        )
        assert error.endswith("or set XBN_NATIVE=0 to run without the library, slowly")
    assert (
        missing.startswith("False ['xbn_ext runs without its compiled library") and missing.count("xbn_ext runs") == 1
    )
    assert "install a wheel for this platform, or build one" in missing


@pytest.mark.long
def test_a_checkout_that_hides_an_installed_library_says_so(tmp_path):
    """A new user installs from a checkout and starts Python right there."""
    checkout, installed = tmp_path / "checkout" / "xbn_ext", tmp_path / "installed" / "xbn_ext"
    shutil.copytree(ROOT / "xbn_ext", checkout, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    installed.mkdir(parents=True)
    for name in ("__init__.py", "_C.abi3.so"):
        (installed / name).touch()
    _, said = python("import xbn_ext", path=checkout.parent, PYTHONPATH=str(installed.parent))
    assert f"{installed} has it, but {checkout} is imported in its place: start Python in another folder" in said
    assert "install a wheel" not in said


@pytest.mark.long
def test_all_that_is_built_on_the_ops_works_without_the_library():
    """torch's checks of the ops, compiled steps, distributed ones, as they are tested with the library."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not emu and not inductor",
         *(f"tests/{name}" for name in ["test_ops_contract.py", "test_autograd.py", *OF_THE_MEMORY, *OF_ITS_STATE])],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"XBN_NATIVE": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_a_step_imports_no_compiler():
    """Torch's takes as long to import as all else."""
    said, _ = python(STEP)
    assert said == ["[]"]
