"""The Python blocks of README and documentation run as they stand, those of a page one after the other; links lead
somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_python_blocks(page, capsys):
    pytest.importorskip("pytorch_metric_learning")
    names = {}
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), names)
        printed = "".join(capsys.readouterr().out.split())
        for shown in re.findall(r"^print\(.*\n((?:#.*\n)+)", block, re.MULTILINE):
            shown = "".join(shown.replace("#", "").split())
            assert shown in printed, "what the page says is printed"


def test_the_pages_with_code_are_found():
    assert {"README", "guide", "migration"} <= {page.stem for page in WITH_CODE}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for file in re.findall(r"`((?:benchmarks|examples|train|tests|xbn_ext|csrc|docs)/[\w./-]+\.\w+)`", text):
        assert any(name in file for name in ("NAME", "FAMILY")) or (ROOT / file).exists(), file


def anchor(heading):
    """Of a heading in a page: lower case, with hyphens, without the marks."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"\s+", "-", re.sub(r"[^\w\- ]", "", words))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_headings(page):
    for target, name in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", page.read_text(encoding="utf-8")):
        other = (page.parent / target) if target else page
        text = re.sub(r"^```.*?^```", "", other.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        assert name in map(anchor, re.findall(r"^#+ (.*)$", text, re.MULTILINE)), f"{target}#{name}"


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= 1000


def test_the_navigation_has_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f" {page.name}\n" in navigation, page.name


def test_every_example_is_short_and_in_the_tables():
    for path in (ROOT / "examples").glob("[a-z]*.py"):
        if "\n    python -m examples." in (text := path.read_text(encoding="utf-8")):
            assert len(text.splitlines()) < 80, path.name
            assert f"]({path.name})" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
            assert f'"examples/{path.name}"' in (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
