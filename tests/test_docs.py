"""The documentation: its code runs, its commands exist, its links lead somewhere.

Python blocks of a page run in order, in one namespace. What a page takes for granted, a user's own model or
loader, is given to them here: small, but real. A block that cannot run at all is marked on the line above
it, ``<!-- not run: why -->``, and still has to compile.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import json
import logging
import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sgd_probe import LoopProbe, SGDProbe, WindowResult
from sgd_probe.cli import main as command_line

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
MARK = re.compile(r"<!-- not run: \S.* -->")


class Block(NamedTuple):
    """A block of a page: ``language`` is that of its fence, "" for an indented one."""

    language: str
    text: str
    line: int
    runs: bool


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    index = 0
    while index < len(lines):
        start, line = index, lines[index]
        fence = re.match(r"( *)```(\w*)", line)
        index += 1
        if fence:
            while not lines[index].strip().startswith("```"):
                index += 1
            text = "\n".join(row.removeprefix(fence[1]) for row in lines[start + 1 : index])
            found.append(Block(fence[2], text, start + 2, not MARK.match(lines[start - 1])))
            index += 1
        elif line.startswith("    ") and not lines[start - 1].strip():
            while index < len(lines) and (lines[index].startswith("    ") or not lines[index].strip()):
                index += 1
            text = "\n".join(row.removeprefix("    ") for row in lines[start:index]).rstrip()
            found.append(Block("", text, start + 1, not MARK.match(lines[start - 2])))
    return found


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def is_shell(block: Block) -> bool:
    programs = {"make", "pip", "python", "sgd-probe", "git", "bash", "source", "wandb"}
    return block.language in ("sh", "bash", "shell") or (
        not block.language and block.text.split()[0].rpartition("/")[2] in programs
    )


# --- python ---------------------------------------------------------------------------------------------


class Small(pl.LightningModule):
    """What a reader has: a module with a loss and an optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)  # type: ignore[no-any-return]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def given_names(page: Path) -> dict[str, Any]:
    """What the pages take for granted, as they name it."""
    pl.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
    model = Small()
    names: dict[str, Any] = {
        "__name__": f"page_{page.stem.replace('-', '_')}",
        "pl": pl,
        "torch": torch,
        "SGDProbe": SGDProbe,
        "EarlyStopping": pl.callbacks.EarlyStopping,
        "WandbLogger": functools.partial(pl.loggers.WandbLogger, offline=True),
        "model": model,
        "LoopProbe": LoopProbe,
        "epochs": 10,
        "pager": Pager(),
        "loss_fn": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "train_loader": DataLoader(data, batch_size=16, shuffle=True),
        "loader": DataLoader(data, batch_size=4, shuffle=True),
    }
    return names


class Pager:
    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, text: str) -> None:
        self.sent.append(text)


def given_transformers(folder: Path) -> dict[str, Any]:
    """The same for pages that go on to the ``Trainer`` of transformers, which wants other models and data."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from sgd_probe.integrations.huggingface import SGDProbeCallback

    tiny = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(16, (240, 8))]
    arguments = TrainingArguments(
        str(folder),
        max_steps=60,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    names = {
        "Trainer": Trainer,
        "SGDProbeCallback": SGDProbeCallback,
        "model": GPT2LMHeadModel(tiny),
        "arguments": arguments,
        "data": rows,
    }
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)  # what a trainer writes by default goes to where one is
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = given_names(page)
    seen: list[tuple[str, Any]] = []
    output = io.StringIO()
    with caplog.at_level(logging.WARNING, "sgd_probe"), contextlib.redirect_stdout(output):
        for block in python_blocks(page):
            code = compile(block.text, f"{page}:{block.line}", "exec")
            if not block.runs:
                continue
            if "Trainer(model=" in block.text:
                if importlib.util.find_spec("transformers") is None:
                    pytest.skip("transformers is not installed")
                names |= given_transformers(tmp_path)
            exec(code, names)
            trainer = names.get("trainer")
            added: list[Any] = [c for c in getattr(trainer, "callbacks", []) if isinstance(c, SGDProbe)]
            seen += [(block.text, probe) for probe in added or [names.get("probe")]]
    # Where windows are opened as time allows, a machine that is busy may leave time for none.
    slow = any("at the present pace" in message for message in caplog.messages)
    for message in caplog.messages:
        assert not re.search("switched off|off for this fit|no window at", message), message
    for text, probe in seen:
        if probe is not None and re.search(r"\.fit\(|\.train\(\)|\.watch\(", text):
            assert probe.results or slow, f"no window closed in\n{text}"
    check = CHECKS.get(page.name)
    if check is not None:
        check(names, output.getvalue())


def check_getting_started(names: dict[str, Any], output: str) -> None:
    """The page promises a flagged direction, and to say of every mode why."""
    flags, results = names["probe"].flags, names["probe"].results
    assert len(results) == 2
    assert flags
    for flag in flags:
        assert str(flag) in output
    assert all(mode.reason in output for mode in results[-1].modes)
    lines = Path("first_run/windows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [WindowResult.from_dict(json.loads(line)).index for line in lines] == [0, 1]
    assert command_line(["report", "first_run", "--output", "again.html"]) == 0


CHECKS: dict[str, Callable[[dict[str, Any], str], None]] = {
    "getting-started.md": check_getting_started,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_indented_is_no_python(page: Path) -> None:
    """Code without a fence would not be run: an indented block is a formula or a command."""
    for block in blocks(page):
        if not block.language and not is_shell(block):
            with pytest.raises(SyntaxError):
                ast.parse(block.text)


# --- commands -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    for block in filter(is_shell, blocks(page)):
        for line in block.text.splitlines():
            for words in commands(line):
                assert not unknown(words), f"{page.name}:{block.line}: {unknown(words)} in {line!r}"


def commands(line: str) -> list[list[str]]:
    """The words of each command of a line, its comment left out."""
    found: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word in ("&&", ";"):
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]


def test_a_wrong_command_is_seen() -> None:
    for line in (
        "make demos",
        "make demo DEMO_ARG=--quick",
        "sgd-probe reports run",
        "sgd-probe report run --out page.html",
        "sgd-probe demo --fast",
        "python benchmarks/no.py",
        "python examples/plain_loop.py --slow",
        "python -m sgd_probe demo --fast",
        "python -c 'import'",
        'pip install ".[wand]"',
        "bash .ci/walk",
        "frobnicate",
    ):
        assert unknown(shlex.split(line)), line


def unknown(words: list[str]) -> str:
    """What of a command does not exist, "" if all of it does."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # QUICK=1 make bench
        words = words[1:]
    program = words[0].rpartition("/")[2]
    if words[0].startswith(".ci/") or program == "bash":
        script = words[0] if program != "bash" else words[1]
        return "" if (ROOT / script).is_file() else script
    checks = {"make": _make, "sgd-probe": _sgd_probe, "pip": _pip, "python": _python}
    if program in checks:
        return checks[program](words[1:])
    return "" if program in ("git", "cd", "source", "wandb", "torchrun") else program


def _make(words: list[str]) -> str:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, assigned, _ = word.partition("=")
        known = rf"^{name} *\?=" if assigned else rf"^{name}:"
        if not re.search(known, makefile, re.MULTILINE):
            return word
    return ""


@functools.cache
def _help(command: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = command_line([command, "--help"])
        except SystemExit as done:
            code = int(done.code or 0)
    return output.getvalue() if code == 0 else ""


def _sgd_probe(words: list[str]) -> str:
    if words[:1] in (["--help"], ["--version"]):
        return ""
    if not _help(words[0]):
        return words[0]
    return _options(words[1:], _help(words[0]))


def _options(words: list[str], text: str) -> str:
    options = [word.partition("=")[0] for word in words if re.match("--?[a-z]", word)]
    return next((o for o in options if not re.search(rf"(?<![\w-]){o}(?![\w-])", text)), "")


def _pip(words: list[str]) -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in words[1:]:
        extras = re.fullmatch(r"(?:\.|sgd-probe)\[(.*)\]", word)
        if extras and not set(extras[1].split(",")) <= set(project["optional-dependencies"]):
            return word
    return "" if words[0] == "install" else words[0]


def _python(words: list[str]) -> str:
    if words[0] == "-m":
        modules = {"sgd_probe": _sgd_probe, "pip": _pip}
        if words[1] in modules:
            return modules[words[1]](words[2:])
        return "" if importlib.util.find_spec(words[1]) else words[1]
    if words[0] == "-c":
        try:
            compile(words[1], "-c", "exec")
        except SyntaxError:
            return words[1]
        return ""
    script = ROOT / words[0]
    if not script.is_file():
        return words[0]
    helpers = script.parent.glob("_*.py")  # benchmarks share some of their options
    source = "".join(path.read_text(encoding="utf-8") for path in (script, *helpers))
    return _options(words[1:], source)


# --- the pages themselves -------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name} links to {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in text]
    assert not missing, f"the README does not link to {missing}"


def reference() -> Any:
    path = ROOT / "docs" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_that_of_the_docstrings() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == reference().render(), "python docs/reference.py writes it anew"


def test_the_reference_has_every_public_name() -> None:
    import sgd_probe
    import sgd_probe.theory

    names = {*sgd_probe.__all__, *sgd_probe.theory.__all__} - {"__version__"}
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert names <= set(re.findall(r"^### (\w+)$", page, re.MULTILINE))
    for field in sgd_probe.ProbeConfig.__dataclass_fields__:
        assert re.search(rf"^- `{field}` \(.*default .*\): \S", page, re.MULTILINE), field
