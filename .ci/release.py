#!/usr/bin/env python3
"""Check what a release would hand out: build it from the last commit, look into it, install it, use it.

    .ci/release.py                # in a clean environment, with the newest versions that pip finds
    .ci/release.py --lowest       # with the lowest versions that pyproject.toml declares
    .ci/release.py --keep DIR     # leave the distributions there

It needs git and setuptools, and for what it installs pip's usual sources. Nothing is published.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = {"sgd_probe/py.typed", "sgd_probe/report/report.css", "sgd_probe/report/report.js"}
HEAVY = ("lightning", "numpy", "plotly", "pytorch_lightning", "scipy", "torch", "transformers", "wandb")

#: A user's file: what is right in it must pass a strict type checker, and what is wrong must be seen.
TYPED = """\
from sgd_probe import Flag, LoopProbe, ProbeConfig, SGDProbe, Verdict, WindowResult, find_flags
from sgd_probe.theory import SGDDynamics, SGDMode


def told(flag: Flag) -> None:
    print(flag.mode, flag.diffusion.value)


probe = SGDProbe(top=5, flat=2, on_flag=told, config=ProbeConfig(interior=2))
results: list[WindowResult] = probe.results
flags: tuple[Flag, ...] = find_flags(results)
confined: int = results[0].counts()[Verdict.CONFINED]
variance: float = SGDMode(1.0, 0.1, SGDDynamics(0.1)).stationary_variance()
"""
MISTAKES = {
    "SGDProbe(topp=5)": "call-arg",
    'ProbeConfig(window="long")': "arg-type",
    "results[0].verdict": "attr-defined",
    "LoopProbe()": "call-arg",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run all checks; the first that fails raises."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lowest", action="store_true", help="install the lowest declared versions")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the distributions there")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        tree, out = work / "tree", (options.keep or work / "dist").resolve()
        export(tree)
        sdist, wheel = build(tree, out)
        check_contents(sdist, wheel)
        _told(f"{sdist.name} and {wheel.name} are whole")
        python = install(wheel, work / "env", lowest() if options.lowest else [])
        check_installed(python, tree, work / "elsewhere", types=not options.lowest)
    print("The release check has passed.")


def export(tree: Path) -> None:
    """Write the files of the last commit, and nothing else, into a new folder."""
    tree.mkdir(parents=True)
    changed = _run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT)
    if changed:
        print(f"not in what is checked, since not committed:\n{changed}", file=sys.stderr)
    archive = tree.with_suffix(".tar")
    _run(["git", "archive", "--output", str(archive), "HEAD"], cwd=ROOT)
    with tarfile.open(archive) as packed:
        packed.extractall(tree, filter="data")


def build(tree: Path, out: Path) -> tuple[Path, Path]:
    """A source distribution of a tree, and a wheel made from nothing but that.

    The build tools are those of this interpreter.
    """
    out.mkdir(parents=True, exist_ok=True)
    make = f"from setuptools import build_meta; print(build_meta.build_sdist({str(out)!r}))"
    sdist = out / _run([sys.executable, "-c", make], cwd=tree).splitlines()[-1]
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    _run([*pip, "--wheel-dir", str(out), str(sdist)], cwd=out)
    (wheel,) = out.glob(f"{sdist.name.removesuffix('.tar.gz')}-*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """The package is complete, carries its licence and its types, and brings nothing else.

    Raises:
        AssertionError: what is missing, or should not be there.
    """
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sgd_probe").rglob("*.py")} | DATA
    with tarfile.open(sdist) as packed:
        source = {member.name.partition("/")[2] for member in packed if member.isfile()}
    missing = (package | {"LICENSE", "README.md", "pyproject.toml"}) - source
    assert not missing, f"the source distribution lacks {sorted(missing)}"
    tests = {name for name in source if name.startswith(("tests/", "benchmarks/"))}
    assert not tests, f"the source distribution holds {sorted(tests)}"

    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        info = next(name for name in names if name.endswith(".dist-info/METADATA")).partition("/")[0]
        metadata = Parser().parsestr(packed.read(f"{info}/METADATA").decode())
        scripts = packed.read(f"{info}/entry_points.txt").decode()
    missing = (package | {f"{info}/licenses/LICENSE"}) - names
    assert not missing, f"the wheel lacks {sorted(missing)}"
    beside = {name.partition("/")[0] for name in names} - {"sgd_probe", info}
    assert not beside, f"the wheel holds {sorted(beside)} beside the package"
    version = re.search(r'__version__ = "(.+)"', (ROOT / "sgd_probe" / "__init__.py").read_text())
    assert version and metadata["Version"] == version[1], metadata["Version"]
    assert metadata["License-Expression"] == "MIT", metadata["License-Expression"]
    assert "sgd-probe = sgd_probe.cli:main" in scripts, scripts


def lowest() -> list[str]:
    """The lowest version of everything that the project and its W&B extra declare, for pip."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["wandb"]
    return [bound.replace(">=", "==") for bound in declared]


def install(wheel: Path, folder: Path, pinned: Sequence[str]) -> Path:
    """A new environment with the wheel, its W&B extra, and a type checker; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    _told(f"installing into a new environment {' '.join(pinned)}")
    wanted = [f"sgd-probe[wandb] @ {wheel.as_uri()}", *pinned]
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted, "mypy"])
    return python


def check_installed(python: Path, tree: Path, folder: Path, *, types: bool) -> None:
    """The installed package answers, is light, is typed, and does what its first page says.

    Args:
        python: interpreter of an environment that has the package.
        tree: the sources, for their first page.
        folder: to work in, away from the sources.
        types: ask a strict type checker too.

    Raises:
        AssertionError: something is not as it should be.
        subprocess.CalledProcessError: a command failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _run([str(python), "-m", "pip", "check"])
    light = f"import sys, sgd_probe; print(sgd_probe.__file__, *(m for m in {HEAVY} if m in sys.modules))"
    where, *heavy = _run([str(python), "-c", light], cwd=folder).split()
    assert python.parent.parent in Path(where).parents, f"imported from {where}"
    assert not heavy, f"importing sgd_probe imports {heavy}"
    for program in ([str(python), "-m", "sgd_probe"], [str(python.with_name("sgd-probe"))]):
        assert "compare" in _run([*program, "--help"], cwd=folder)
    _told("it answers, and importing it is light")
    if types:
        check_types(python, folder)
        _told("a strict type checker sees its types")
    page = (tree / "docs" / "getting-started.md").read_text(encoding="utf-8")
    (folder / "first.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    output = _run([str(python), "first.py"], cwd=folder)
    assert "diffuses over 500 steps" in output, output
    assert (folder / "first_run" / "report.html").stat().st_size > 1_000_000
    named = "torch", "pytorch-lightning", "numpy", "scipy", "plotly", "wandb"
    ask = f"from importlib.metadata import version; print(*map(version, {named}))"
    versions = zip(named, _run([str(python), "-c", ask]).split(), strict=True)
    _told("its first page does what it says, with " + ", ".join(map(" ".join, versions)))


def check_types(python: Path, folder: Path) -> None:
    """What is right in a user's file passes ``mypy --strict``, and each mistake is one error of its kind."""
    mypy = [str(python), "-m", "mypy", "--strict", "--cache-dir", str(folder / "mypy")]
    (folder / "typed.py").write_text(TYPED)
    _run([*mypy, "typed.py"], cwd=folder)
    (folder / "mistaken.py").write_text(TYPED + "\n".join(MISTAKES) + "\n")
    done = subprocess.run([*mypy, "mistaken.py"], cwd=folder, capture_output=True, text=True, check=False)
    first = len(TYPED.splitlines()) + 1
    for line, kind in enumerate(MISTAKES.values(), start=first):
        assert re.search(rf"^mistaken.py:{line}: error: .*\[{kind}\]$", done.stdout, re.MULTILINE), (
            done.stdout
        )


def _told(text: str) -> None:
    print(f"==> {text}", flush=True)


def _run(command: Sequence[str], cwd: Path | None = None) -> str:
    """The output of a command that must succeed; where it does not, its errors are shown."""
    # What surrounds us must not lend the package to an environment that lacks it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1"}  # on a busy machine threads wait for each other
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, command)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
