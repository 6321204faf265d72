"""``verify``: a leak is named, put back, and switches the probe off; where nothing leaks it is silent."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgd_probe import ProbeConfig, SGDProbe
from sgd_probe.engine import trained as trained_module
from sgd_probe.engine.verification import LeakError, Verification
from sgd_probe.engine.window import Window
from tests.integrations.harness import RecordingDataset, batchnorm, fit, loader, mlp

#: Of the training step below.
SEEN: dict[str, Any] = {"calls": 0}
COUNT = 0


@pytest.fixture
def no_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolation that takes no file for the user's own, and so leaves its globals alone."""
    monkeypatch.setattr("sgd_probe.isolation._is_own", lambda scope: False)


def count() -> None:
    global COUNT
    COUNT += 1


def probe(**options: Any) -> SGDProbe:
    return SGDProbe(
        top=2,
        flat=1,
        window=60,
        every_n_steps=80,
        curvature_batches=2,
        config=ProbeConfig(verify=True),
        **options,
    )


def data() -> Any:
    return loader(RecordingDataset((6,)))


def leaking(kind: str) -> Any:
    """A module whose training step writes where isolation does not look."""

    def make(base: Any) -> Any:
        module = mlp(base)
        inner = module.training_step

        class Leaking(type(module)):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                if kind == "global":
                    SEEN["calls"] += 1
                if kind == "function":
                    count()
                if kind == "optimizer" and "log" in vars(self):  # only where the probe calls it
                    for state in self.trainer.optimizers[0].state.values():
                        state["momentum_buffer"].zero_()
                return inner(batch, batch_idx)

        module.__class__ = Leaking
        return module

    return make


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("global", "global tests.integrations.test_verify.SEEN['calls'] (0 -> "),
        ("function", "global tests.integrations.test_verify.COUNT (0 -> "),
        ("optimizer", "optimizer.state[network.1.weight]['momentum_buffer'] (#"),
    ],
)
@pytest.mark.usefixtures("no_globals")
def test_a_leak_is_named_and_put_back(
    kind: str, named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    global COUNT
    found = {}
    for probed in (False, True):
        SEEN["calls"] = COUNT = 0
        callbacks = [probe()] if probed else []
        taken, _ = fit("pytorch_lightning", leaking(kind), data, callbacks, tmp_path / str(probed), steps=70)
        found[probed] = (taken, SEEN["calls"], COUNT)
    found[False][0].assert_equal(found[True][0])
    assert found[False][1:] == found[True][1:]
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert "switched off" in warning and named in warning and "all of it has been put back" in warning
    where = "opening a window" if kind == "optimizer" else "the preflight"
    assert f"expected {where}" in warning


@pytest.mark.usefixtures("no_globals")
def test_strict_raises(tmp_path: Path) -> None:
    SEEN["calls"] = 0
    with pytest.raises(LeakError, match="SEEN"):
        fit("pytorch_lightning", leaking("global"), data, [probe(strict=True)], tmp_path, steps=40)


def test_an_isolation_that_does_not_isolate_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextmanager
    def open_doors(*_: Any) -> Iterator[None]:
        with torch.enable_grad():
            yield

    without, _ = fit("pytorch_lightning", mlp, data, [], tmp_path / "without", steps=40)
    monkeypatch.setattr(trained_module, "isolated", open_doors)
    found, _ = fit("pytorch_lightning", mlp, data, [probe()], tmp_path / "with", steps=40)
    without.assert_equal(found)
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert "expected the preflight to leave the training as it was, found changed: " in warning
    assert "all of it has been put back" in warning


def test_a_step_that_is_read_is_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observe = Window.observe

    def clumsy(self: Any, draw: Any) -> None:
        observe(self, draw)
        self.space.parameters[0].data.add_(1e-3)

    monkeypatch.setattr(Window, "observe", clumsy)
    with pytest.raises(LeakError, match=r"expected reading a step .* found changed: network.1.weight \(#"):
        fit("pytorch_lightning", mlp, data, [probe(strict=True)], tmp_path, steps=70)


@pytest.mark.parametrize("make", [mlp, batchnorm])
def test_where_nothing_leaks_it_is_silent(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shape = (6,) if make is mlp else (1, 6, 6)

    def images() -> Any:
        return loader(RecordingDataset(shape, augment=True))

    without, _ = fit("pytorch_lightning", make, images, [], tmp_path / "without", steps=90)
    watcher = probe(strict=True)
    found, _ = fit("pytorch_lightning", make, images, [watcher], tmp_path / "with", steps=90)
    without.assert_equal(found)
    assert watcher.results and watcher.results[0].complete
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_what_is_read_of_a_module() -> None:
    class Plain(torch.nn.Module):
        shared: list[int] = []  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)
            self.register_buffer("running", torch.zeros(2))
            self.notes = {"best": 1.5, "rows": [1, 2]}

        def forward(self, inputs: Tensor) -> Tensor:
            found: Tensor = self.layer(inputs) + len(SEEN)
            return found

    module = Plain()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    running = dict(module.named_buffers())["running"]
    verification = Verification(module, optimizer)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    grad = module.layer.weight.grad
    assert grad is not None
    kept = grad.clone()

    def write() -> None:
        module.notes["best"] = 2.5
        module.shared.append(1)
        running.add_(1.0)
        grad.mul_(2.0)
        optimizer.param_groups[0]["lr"] = 0.2
        module.train(False)

    with pytest.raises(LeakError) as caught, verification.around("a test"):
        write()
    for name in ("notes['best'] (1.5 -> 2.5)", "running (#", "training (True -> False)"):
        assert name in str(caught.value) or "more" in str(caught.value)
    assert "all of it has been put back" in str(caught.value)
    assert module.notes["best"] == 1.5 and module.shared == [] and module.training
    assert torch.equal(running, torch.zeros(2)) and torch.equal(grad, kept)
    assert optimizer.param_groups[0]["lr"] == 0.1
