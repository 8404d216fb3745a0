"""What the package says of itself is said once, or the same everywhere; the hosted workflows call what is there."""

import re
from pathlib import Path

import pytest

import xbn_ext

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def parts(requirement):
    """("name", "==1.0") of a requirement; its marker is left out."""
    name, version = re.match(r"([\w.-]+)\s*([^;]*)", requirement).groups()
    return name.lower().replace("_", "-"), version.strip()


def group(name):
    """The requirements of a dependency group and of those that it includes."""
    for entry in PYPROJECT["dependency-groups"][name]:
        yield from [entry] if isinstance(entry, str) else group(entry["include-group"])


def pinned():
    """{name: version} of requirements.txt."""
    lines = read("requirements.txt").splitlines()
    return dict(parts(line) for line in lines if line and not line.startswith("#"))


def test_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert xbn_ext.__version__ == version == xbn_ext.build_info()["version"]
    assert re.search(r"^version: (.+)$", read("CITATION.cff"), re.MULTILINE)[1] == version
    headings = re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", version]
    assert version not in read("xbn_ext/__init__.py") + read("setup.py")


@pytest.mark.parametrize("kind", ["train", "dev"])
def test_requirements_txt_has_what_work_on_a_checkout_needs(kind):
    wanted = PROJECT["optional-dependencies"]["train"] if kind == "train" else group("dev")
    for name, version in map(parts, wanted):
        assert name in pinned(), name
        assert not version.startswith("==") or pinned()[name] == version, name


def test_pre_commit_has_the_versions_of_requirements_txt():
    hooks = re.findall(r"additional_dependencies: \[(.+)\]", read(".pre-commit-config.yaml"))
    assert {parts(hook)[0] for hook in hooks} == {"ruff", "clang-format"}
    for name, version in map(parts, hooks):
        assert pinned()[name] == version


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_documentation_names_extras_and_groups_that_exist(page):
    text = read(page)
    assert set(re.findall(r"(?:xbn_ext|\.)\[([a-z]+)\]", text)) <= set(PROJECT["optional-dependencies"])
    assert set(re.findall(r"--group ([\w-]+)", text)) <= set(PYPROJECT["dependency-groups"])


def test_licences_are_there_and_name_what_is_linked_in():
    for name in PROJECT["license-files"]:
        assert (ROOT / name).exists()
    assert "libcudart_static.a" in read("setup.py") and "libcudart_static.a" in read("THIRD_PARTY.md")


def test_classifiers_begin_with_the_oldest_python():
    minors = [int(m[1]) for c in PROJECT["classifiers"] if (m := re.fullmatch(r".*:: Python :: 3\.(\d+)", c))]
    assert PROJECT["requires-python"] == f">=3.{minors[0]}" and minors == sorted(minors)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_calls_what_is_there(workflow):
    text = workflow.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([\w-]+)", text)) <= targets
    for path in re.findall(r"\btools/[\w./-]+\.\w+", text):
        assert (ROOT / path).exists(), path
    assert text.startswith("# Not run yet")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_pins_its_actions_by_commit(workflow):
    used = re.findall(r"uses: (.+)", workflow.read_text(encoding="utf-8"))
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", action), action


def test_workflows_test_the_oldest_torch_and_python():
    tests = read(".github/workflows/tests.yml")
    [torch] = [version for name, version in map(parts, PROJECT["dependencies"]) if name == "torch"]
    assert f"torch=={torch.removeprefix('>=')}.*/" in tests
    assert f'python: ["{PROJECT["requires-python"].removeprefix(">=")}", ' in tests
    assert f"torch=={torch.removeprefix('>=')}.*" in read("tools/cibuildwheel.toml")


def test_a_bug_report_asks_what_was_built():
    assert "xbn_ext.build_info()" in read(".github/ISSUE_TEMPLATE/bug.yml")
