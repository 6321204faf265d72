"""The rules of the house, read from the source: who may import whom, and what may never appear.

The rules are checked on syntax trees, so a module that does not even import cannot hide a broken rule.
What an import really brings along is checked in fresh interpreters.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import sgd_probe

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sgd_probe"

# A room is a module or a folder right below the package: what it may import of ours besides itself.
ROOMS: dict[str, set[str]] = {
    "result": set(),
    "flags": {"result"},
    "isolation": set(),
    "theory": set(),
    "dynamics": {"theory", "result"},
    "curvature": {"isolation"},
    "engine": {"curvature", "dynamics", "theory", "result", "isolation"},
    "report": {"result"},
    "sinks": {"result", "report", "flags"},
    "integrations": {"engine", "sinks", "result", "isolation", "flags"},
}

# The shell may import every room and the public names; nothing imports the shell, but for these lazy ways in.
SHELL = {"__init__", "__main__", "cli", "demo"}
WITHIN_SHELL = {("__main__", "cli"), ("cli", "demo")}

# Who alone may import a package from elsewhere: a heavy or optional one has one door, a dangerous one none.
DOORS: dict[str, set[str]] = {
    "wandb": {"sgd_probe.sinks.wandb"},
    "wandb_workspaces": {"sgd_probe.sinks.wandb"},
    "plotly": {"sgd_probe.report"},
    "lightning": {"sgd_probe.integrations", "sgd_probe.demo"},
    "pytorch_lightning": {"sgd_probe.integrations", "sgd_probe.demo"},
    "lightning_fabric": {"sgd_probe.integrations", "sgd_probe.demo"},
    "transformers": {"sgd_probe.integrations"},
    "pyhessian": set(),
    "sklearn": {"sgd_probe.demo"},
    "pickle": set(),
    "cloudpickle": set(),
    "dill": set(),
    "joblib": set(),
    "marshal": set(),
    "shelve": set(),
}

# What `import sgd_probe` alone must not bring.
HEAVY = {
    "torch",
    "pytorch_lightning",
    "lightning",
    "wandb",
    "wandb_workspaces",
    "plotly",
    "transformers",
    "pyhessian",
    "sklearn",
}
# What a user may not have installed. (rich and transformers cannot be hidden: Lightning and torchmetrics
# trust their metadata and import them.)
OPTIONAL = {"wandb", "wandb_workspaces", "pyhessian", "sklearn"}


@dataclass(frozen=True)
class Import:
    """One imported name; ``from a.b import c`` reads ``a.b.c``."""

    target: str
    line: int
    lazy: bool


def imports(node: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """Every import below ``node``, also under ``if TYPE_CHECKING`` and through ``import_module("...")``."""
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        match child:
            case ast.Import():
                yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
            case ast.ImportFrom():
                base = "." * child.level + (child.module or "")
                yield from (Import(f"{base}.{alias.name}", child.lineno, lazy) for alias in child.names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(name, child.lineno, lazy)
        yield from imports(child, inside)


def room_of(module: str) -> str:
    """``sgd_probe.sinks.wandb`` is in ``sinks``, a public name (``sgd_probe.SGDProbe``) in ``__init__``."""
    below = module.removeprefix("sgd_probe").lstrip(".").split(".")[0]
    return below if below in ROOMS.keys() | SHELL else "__init__"


def forbidden_import(module: str, found: Import) -> str | None:
    """Why ``module`` may not import ``found``, or None."""
    top = found.target.split(".")[0]
    if top == "":
        return "relative import; write the absolute one"
    if found.target == "torch.load":
        return "import torch and call torch.load(..., weights_only=True)"
    if top in DOORS:
        open_to = any(module == door or module.startswith(door + ".") for door in DOORS[top])
        return None if open_to else f"imports {top}"
    if top != "sgd_probe" or found.target == "sgd_probe.__version__":
        return None
    here, there = room_of(module), room_of(found.target)
    if here in SHELL:
        lazy_enough = found.lazy or here == "__main__"
        allowed = there in ROOMS or there == "__init__" or ((here, there) in WITHIN_SHELL and lazy_enough)
    else:
        allowed = there == here or there in ROOMS[here]
    return None if allowed else f"{here} imports {there}"


def forbidden_call(call: ast.Call) -> str | None:
    """Why this call may not be in the package, or None."""
    function = ast.unparse(call.func)
    constants = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
    given = {k.arg for k in call.keywords}
    if function.endswith(("torch.load", "torch.serialization.load")) and not constants.get("weights_only"):
        return "torch.load without weights_only=True"
    if "allow_pickle" in given and constants.get("allow_pickle", True):
        return "allow_pickle"
    graph_kept = "create_graph" in given and constants.get("create_graph", True)
    runs = function.endswith("backward") and not function.endswith("save_for_backward")
    if runs and (graph_kept or len(call.args) > 2):
        return "backward with create_graph: use torch.autograd.grad"
    return None


def violations(module: str, source: str) -> list[str]:
    """The rules that the source of ``module`` breaks, each with its line."""
    tree = ast.parse(source)
    broken = [(found.line, forbidden_import(module, found)) for found in imports(tree)]
    broken += [(node.lineno, forbidden_call(node)) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [f"{module}, line {line}: {why}" for line, why in sorted(broken, key=str) if why]


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name (a package by that of its folder)."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


@pytest.mark.parametrize("module", sources())
def test_module_keeps_the_rules(module: str) -> None:
    assert violations(module, sources()[module].read_text(encoding="utf-8")) == []


def test_every_room_has_its_rule() -> None:
    found = {module.split(".")[1] for module in sources() if "." in module}
    assert found <= ROOMS.keys() | SHELL, "a new room: say in ROOMS what it may import"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sgd_probe.theory.closed_forms", "from sgd_probe.result import Verdict"),
        ("sgd_probe.theory.closed_forms", "import sgd_probe.dynamics"),
        ("sgd_probe.dynamics.verdict", "from sgd_probe import curvature"),
        ("sgd_probe.dynamics.verdict", "import pytorch_lightning as pl"),
        ("sgd_probe.curvature.space", "from sgd_probe.dynamics import projection"),
        ("sgd_probe.engine.probe", "def f():\n    from sgd_probe.sinks.base import Sink"),
        ("sgd_probe.engine.probe", "if TYPE_CHECKING:\n    from lightning.pytorch import Trainer"),
        ("sgd_probe.report.html", "import sgd_probe.sinks.base"),
        ("sgd_probe.sinks.folder", "from wandb import Html"),
        ("sgd_probe.sinks.folder", "import plotly.graph_objects as go"),
        ("sgd_probe.sinks.loggers", "importlib.import_module('wandb')"),
        ("sgd_probe.integrations.loop", "from sgd_probe.demo import main"),
        ("sgd_probe.integrations.loop", "from sgd_probe import SGDProbe"),
        ("sgd_probe.cli", "from sgd_probe import demo"),
        ("sgd_probe.demo", "def f():\n    import sgd_probe.cli"),
        ("sgd_probe.result", "import pickle"),
        ("sgd_probe.result", "from .theory import closed_forms"),
        ("sgd_probe.result", "from . import theory"),
        ("sgd_probe.isolation", "torch.load(path)"),
        ("sgd_probe.isolation", "torch.load(path, weights_only=False)"),
        ("sgd_probe.isolation", "from torch import load"),
        ("sgd_probe.isolation", "np.load(path, allow_pickle=True)"),
        ("sgd_probe.curvature.hessian", "loss.backward(create_graph=True)"),
        ("sgd_probe.curvature.hessian", "torch.autograd.backward(loss, None, True, True)"),
    ],
)
def test_a_broken_rule_is_seen(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sgd_probe.dynamics.verdict", "from sgd_probe.theory.closed_forms import stationary_variance"),
        ("sgd_probe.engine.probe", "from sgd_probe import curvature, isolation"),
        ("sgd_probe.sinks.wandb", "def f():\n    import wandb"),
        ("sgd_probe.sinks.folder", "from sgd_probe import __version__"),
        ("sgd_probe.report.figures", "import plotly.graph_objects as go"),
        ("sgd_probe.integrations.lightning", "import pytorch_lightning as pl"),
        ("sgd_probe.cli", "def f():\n    from sgd_probe.demo import main"),
        ("sgd_probe.__main__", "from sgd_probe.cli import main"),
        ("sgd_probe.demo", "from sgd_probe import SGDProbe"),
        ("sgd_probe.isolation", "torch.load(path, weights_only=True)"),
        ("sgd_probe.isolation", "np.load(path, allow_pickle=False)"),
        ("sgd_probe.curvature.hessian", "torch.autograd.grad(loss, weights, create_graph=True)"),
        ("sgd_probe.curvature.hessian", "loss.backward()"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_type_checkers_see_the_public_names() -> None:
    """The lazy names and the imports that a type checker reads instead must agree."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    seen = {found.target.rpartition(".")[::2] for found in imports(tree) if found.target[:4] == "sgd_"}
    lazy = {(home, name) for name, home in sgd_probe._HOMES.items()}
    assert seen == lazy
    assert {name for _, name in lazy} | {"__version__"} == set(sgd_probe.__all__) <= set(dir(sgd_probe))


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'SDGProbe'"):
        _ = sgd_probe.SDGProbe  # type: ignore[attr-defined]


def run_fresh(code: str) -> str:
    """What ``code`` prints in an interpreter of its own."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_is_light() -> None:
    loaded = run_fresh("import sys, sgd_probe; print(*sys.modules)").split()
    assert "sgd_probe" in loaded
    assert HEAVY.isdisjoint(loaded)


def test_public_names_need_no_optional_package() -> None:
    run_fresh(
        f"import sys; sys.modules |= dict.fromkeys({sorted(OPTIONAL)})\n"  # None there: not importable
        "import sgd_probe\n"
        "for name in sgd_probe.__all__: getattr(sgd_probe, name)"
    )
