"""What a release would hand out, as far as it can be checked without installing anything.

``make release`` goes on from here: a clean environment, a type checker, the lowest declared versions.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

import sgd_probe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files as they are now, so that no build folder appears in the checkout."""
    tree = tmp_path_factory.mktemp("release") / "tree"
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.mark.slow
def test_the_distributions_are_whole(release: ModuleType, tree: Path) -> None:
    sdist, wheel = release.build(tree, tree.parent / "dist")
    assert wheel.name == f"sgd_probe-{sgd_probe.__version__}-py3-none-any.whl"
    release.check_contents(sdist, wheel)


@pytest.mark.slow
def test_a_distribution_that_lacks_its_types_is_refused(release: ModuleType, tree: Path) -> None:
    (tree / "sgd_probe" / "py.typed").unlink()
    sdist, wheel = release.build(tree, tree.parent / "broken")
    with pytest.raises(AssertionError, match=r"lacks \['sgd_probe/py\.typed'\]"):
        release.check_contents(sdist, wheel)


def test_the_lowest_versions_are_those_declared(release: ModuleType) -> None:
    lowest = release.lowest()
    assert "torch==2.6" in lowest
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", pinned) for pinned in lowest)


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: {re.escape(sgd_probe.__version__)}$", text, re.MULTILINE)
    assert "arXiv:2605.22644" in text
