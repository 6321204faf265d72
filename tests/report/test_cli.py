"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

import sgd_probe
from sgd_probe.cli import main
from tests.helpers.results import make_window, write_run_folder


def exit_code(*arguments: str) -> int:
    """The exit code of a command, whether it returns or exits."""
    try:
        return main(arguments)
    except SystemExit as error:
        assert isinstance(error.code, int)
        return error.code


def test_report_writes_the_page_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run_folder(tmp_path / "run", [make_window()])
    assert exit_code("report", str(folder)) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert exit_code("report", str(folder), "--output", str(tmp_path / "page.html")) == 0
    assert (tmp_path / "page.html").read_bytes() == (folder / "report.html").read_bytes()


def test_compare_writes_the_page_and_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run_folder(tmp_path / name, [make_window()])
    assert exit_code("compare", "a", "b") == 0
    check, path = capsys.readouterr().out.splitlines()
    assert check.startswith("b against a: the learning rate is 1.00 times as large")
    assert path == "comparison.html" and Path(path).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "RUN_FOLDER"),
        (["compare", "nowhere"], "at least two run folders"),
        (["compare", "nowhere", "."], "expected a run folder"),
        (["report", "nowhere"], "expected a run folder"),
        (["report", "."], "expected run.json"),
        (["report"], "RUN_FOLDER"),
        (["report", "a", "b"], "unrecognized arguments: b"),
        (["nonsense"], "invalid choice"),
        ([], "COMMAND"),
    ],
)
def test_errors_are_one_line_on_stderr_with_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"sgd-probe {sgd_probe.__version__}\n"


def test_help_lists_the_commands_and_imports_no_torch() -> None:
    code = (
        "import sys; from sgd_probe.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'plotly', 'pytorch_lightning'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "report" in done.stdout
    assert "demo" in done.stdout


def test_module_is_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sgd_probe", "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("sgd-probe: error: expected run.json")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--steps", "3", "--", "--version"]])
def test_demo_parses_its_own_arguments(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequence[str] | None] = []

    def demo(argv: Sequence[str] | None = None) -> int:
        seen.append(argv)
        return 7

    module = ModuleType("sgd_probe.demo")
    module.main = demo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sgd_probe.demo", module)
    assert exit_code("demo", *arguments) == 7
    assert seen == [arguments]


def test_a_missing_package_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sgd_probe.demo", None)
    assert exit_code("demo") == 2
    assert capsys.readouterr().err.startswith("sgd-probe: error: import of sgd_probe.demo halted")
