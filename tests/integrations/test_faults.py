"""Faults injected into a running fit: docs/failures.md says what happens, and so it does.

Each training is compared, weights and random numbers, with one without the probe. What else is tested where:
memory in test_short_memory.py, the processes of DDP in test_distributed.py, SIGKILL in test_resume.py.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sgd_probe import SGDProbe
from sgd_probe.curvature.hessian import CurvatureError
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.engine import probe as probe_module
from sgd_probe.sinks.folder import read_run
from tests.integrations.harness import RecordingDataset, loader

ROOT = Path(__file__).resolve().parent.parent.parent


class BadProduct(torch.autograd.Function):
    """The identity; its second derivative is not a number."""

    @staticmethod
    def forward(context: Any, inputs: Tensor) -> Tensor:
        context.save_for_backward(inputs)
        found: Tensor = inputs.clone()
        return found

    @staticmethod
    def backward(context: Any, *slopes: Tensor) -> Tensor:
        (inputs,) = context.saved_tensors
        found: Tensor = slopes[0] + 0.0 * (inputs - inputs.detach()).abs().sqrt()
        return found


class Careful(torch.optim.SGD):
    """Makes no step where a gradient is not finite, as careful loops do."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            super().step()
        return loss


class Faulty(pl.LightningModule):
    """A training with a fault of some kind.

    Args:
        fault: which.
    """

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4)
        self.fault = fault

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        probed = "log" in vars(self)  # the trainer's own calls have the real one
        if probed and self.fault == "exception":
            raise ValueError("cannot be called twice")
        if probed and self.fault == "memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes.")
        logits = self.layer(inputs)
        if self.fault == "products":
            logits = BadProduct.apply(logits)  # type: ignore[no-untyped-call]
        return nn.functional.cross_entropy(logits, labels)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.fault == "gradients" and self.global_step % 10 == 5:
            assert self.layer.bias.grad is not None
            self.layer.bias.grad[0] = math.inf

    def configure_optimizers(self) -> Any:
        return Careful(self.parameters(), lr=0.05)


def fit(fault: str, folder: Path, probe: SGDProbe | None, **options: Any) -> tuple[Any, pl.Trainer]:
    """Everything that the probe may not change, after 130 steps."""
    pl.seed_everything(1, verbose=False)
    module = Faulty(fault)
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": 130,
            "max_epochs": -1,
            "callbacks": [] if probe is None else [probe],
            "logger": False,
            "default_root_dir": folder,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )
    trainer.fit(module, loader(RecordingDataset((6,))))
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_post_hooks and "log" not in vars(module)
    return ([p.tolist() for p in module.parameters()], torch.get_rng_state().tolist()), trainer


def quick(**options: Any) -> SGDProbe:
    return SGDProbe(
        **{"top": 3, "flat": 2, "window": 60, "every_n_steps": 60, "curvature_batches": 2, **options}
    )


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "sgd_probe" and r.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("fault", "raised", "said"),
    [
        ("exception", ValueError, "cannot be called twice"),
        ("memory", CurvatureError, "memory is too short for the graph of a single sample"),
    ],
)
def test_training_goes_on_with_one_warning_and_strict_raises(
    fault: str, raised: type[Exception], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without, _ = fit(fault, tmp_path / "without", None)
    probe = quick()
    found, trainer = fit(fault, tmp_path / "with", probe)
    assert found == without and trainer.global_step == 130 and probe.results == []
    (warning,) = warnings_of(caplog)
    assert warning.startswith("sgd_probe: switched off for the rest of this fit (") and said in warning
    assert "the next fit has the probe again" in warning
    with pytest.raises(raised, match=said):
        fit(fault, tmp_path / "strict", quick(strict=True))


def test_products_that_are_never_finite_switch_it_off_after_three_windows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "RETRY_STEPS", 20)
    without, _ = fit("products", tmp_path / "without", None)
    probe = quick()
    found, trainer = fit("products", tmp_path / "with", probe)
    assert found == without and trainer.global_step == 130 and probe.results == []
    first, last = warnings_of(caplog)
    assert "no window at step 4: expected a finite Hessian-vector product" in first
    assert "switched off" in last and "(3 windows in a row)" in last
    with pytest.raises(CurvatureError, match="expected a finite Hessian-vector product"):
        fit("products", tmp_path / "strict", quick(strict=True))


def test_gradients_that_are_not_finite_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without, _ = fit("gradients", tmp_path / "without", None)
    probe = quick(strict=True)
    found, _ = fit("gradients", tmp_path / "with", probe)
    assert found == without and warnings_of(caplog) == []
    first = probe.results[0]
    assert (first.steps, first.skipped_steps) == (54, 6) and first.complete
    assert any("left out" in note for note in first.warnings)
    assert all(math.isfinite(mode.noise_variance.value) for mode in first.modes)


def test_a_window_that_cannot_open_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products overflow for a while, as they do in a spike of the loss."""
    monkeypatch.setattr(probe_module, "RETRY_STEPS", 10)
    flatten, spikes = ParameterSpace.flatten, [1]

    def overflowing(self: Any, tensors: Any) -> Tensor:
        flat = flatten(self, tensors)
        return flat * math.inf if spikes and within("find_modes") and spikes.pop() else flat

    monkeypatch.setattr(ParameterSpace, "flatten", overflowing)
    without, _ = fit("", tmp_path / "without", None)
    probe = quick()
    found, _ = fit("", tmp_path / "with", probe)
    assert found == without
    (warning,) = warnings_of(caplog)
    assert "no window at step 4: expected a finite Hessian-vector product" in warning
    assert "It is tried again every 10 steps, 3 times in a row at most" in warning
    assert probe.results and probe.results[0].opened_at_step >= 14


def within(name: str) -> bool:
    return any(frame.name == name for frame in traceback.extract_stack())


INTERRUPTED = """
import json, os, signal, sys, threading
from pathlib import Path
from tests.integrations.test_faults import *
from sgd_probe.curvature import lanczos
from sgd_probe.curvature.hessian import HessianOperator

probed = sys.argv[2] == "with"
matvec = HessianOperator.matvec

def interrupting(self, vector):
    if within("lanczos") and self.products == 5:
        os.kill(os.getpid(), signal.SIGINT)
    return matvec(self, vector)

class Stop(pl.Callback):
    # Without the probe the signal comes where the probe would have opened its window.
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if not probed and trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)

HessianOperator.matvec = interrupting
probe = quick(run_dir=Path(sys.argv[1]) / "run")
pl.seed_everything(1, verbose=False)
module = Faulty()
callbacks = [probe, Stop()] if probed else [Stop()]
trainer = pl.Trainer(accelerator="cpu", max_steps=130, max_epochs=-1, callbacks=callbacks, logger=False,
                     default_root_dir=sys.argv[1], enable_checkpointing=False, enable_progress_bar=False,
                     enable_model_summary=False)
ended = "by itself"
try:
    trainer.fit(module, loader(RecordingDataset((6,))))
except BaseException as error:
    ended = type(error).__name__
print(json.dumps({
    "ended": ended, "steps": trainer.global_step, "state": trainer.state.status,
    "weights": [p.tolist() for p in module.parameters()], "rng": torch.get_rng_state().tolist(),
    "hooks": len(trainer.optimizers[0]._optimizer_step_post_hooks), "log": "log" in vars(module),
    "grads": [p.grad is None for p in module.parameters()], "threads": threading.active_count(),
}))
"""


def _interrupted(folder: Path, kind: str) -> Any:
    return _found_by([sys.executable, "-c", INTERRUPTED, str(folder), kind])


def _found_by(command: list[str]) -> Any:
    """What a process of its own prints as a line of JSON."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    line = next((row for row in done.stdout.splitlines() if row.startswith("{")), None)
    assert line is not None, done.stderr
    return json.loads(line)


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_lanczos_stops_as_it_stops_any_training(tmp_path: Path) -> None:
    without, found = (_interrupted(tmp_path / kind, kind) for kind in ("without", "with"))
    assert found["steps"] == 4 and found == without
    assert found["ended"] in ("KeyboardInterrupt", "SystemExit")
    # The folder holds a run without windows, and its page.
    _, windows, note = read_run(tmp_path / "with" / "run")
    assert windows == [] and note == "" and (tmp_path / "with" / "run" / "report.html").exists()


FULL = """
import logging, resource, signal, sys
from pathlib import Path
from sgd_probe.cli import main as command
from tests.integrations.harness import memory_logger
from tests.integrations.test_faults import *

folder, kind = Path(sys.argv[1]), sys.argv[2]
said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("sgd_probe").addHandler(handler)
probe = quick(run_dir=folder / "run", every_n_steps=60)

class Fill(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == (100 if probe.results else -1):
            if kind == "limit":
                room = (folder / "run" / "windows.jsonl").stat().st_size + 100
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            else:
                with open(folder / "filler", "wb", buffering=0) as file:
                    for size in (2**16, 2**10, 1):  # to the last byte
                        try:
                            while True:
                                file.write(bytes(size))
                        except OSError:
                            pass

logger = memory_logger("pytorch_lightning")
found, trainer = fit("", Path(sys.argv[3]), probe, callbacks=[probe, Fill()], logger=logger, max_steps=260)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
rows = [row for _, row in logger.rows if "sgd_probe/lambda_max" in row]
files = sorted(path.name for path in (folder / "run").iterdir())
_, windows, note = read_run(folder / "run")
(folder / "filler").unlink(missing_ok=True)
written = command(["report", str(folder / "run"), "--output", sys.argv[3] + "/page.html"])
print(json.dumps({"said": said, "results": len(probe.results), "rows": len(rows), "files": files,
                  "windows": len(windows), "note": note, "report": written, "weights": found[0]}))
"""


def _full(folder: Path, kind: str, elsewhere: Path, *before: str) -> Any:
    folder.mkdir(exist_ok=True)
    elsewhere.mkdir()
    run = [sys.executable, "-c", FULL, str(folder), kind, str(elsewhere)]
    return _found_by([*before, *run])


def _check_full(found: Any, word: str, elsewhere: Path) -> None:
    assert found["results"] == found["rows"] >= 3, "in memory and in the logger are all windows"
    assert found["windows"] == 1 and found["note"] == "", "nothing half-written"
    assert found["files"] == ["basis_0000.npz", "run.json", "windows.jsonl"]
    (warning,) = found["said"]
    assert "FolderSink failed in write" in warning and word in warning
    assert "results stay in memory (`results`); the next fit tries it again" in warning
    assert found["report"] == 0 and (elsewhere / "page.html").stat().st_size > 1_000_000
    assert found["weights"] == fit("", elsewhere / "without", None, max_steps=260)[0][0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs POSIX limits on the size of files")
def test_files_that_may_not_grow(tmp_path: Path) -> None:
    found = _full(tmp_path / "disk", "limit", tmp_path / "elsewhere")
    _check_full(found, "File too large", tmp_path / "elsewhere")


def _small_disk(folder: Path, kilobytes: int) -> list[str]:
    """What runs a command with a file system of its own at a folder, of so many kilobytes."""
    mount = f'mount -t tmpfs -o size={kilobytes}k none "{folder}" && exec "$0" "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]


def _can_mount(folder: Path) -> bool:
    try:
        return (
            subprocess.run([*_small_disk(folder, 64), "true"], capture_output=True, check=False).returncode
            == 0
        )
    except OSError:
        return False


@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not _can_mount(disk):
        pytest.skip("this system lets nobody mount a file system in a namespace of its own")
    found = _full(disk, "disk", tmp_path / "elsewhere", *_small_disk(disk, 1024))
    _check_full(found, "No space left on device", tmp_path / "elsewhere")


def test_a_folder_that_cannot_be_made_costs_the_folder_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    probe = quick(run_dir=tmp_path / "taken" / "run")
    fit("", tmp_path, probe)
    assert len(probe.results) == 2
    (warning,) = warnings_of(caplog)
    assert "FolderSink failed in start (NotADirectoryError" in warning


def test_no_thread_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgd_probe.integrations.lightning.LONG_PAUSE", 0.0)  # every opening has its bar
    before = threading.active_count()
    fit("", tmp_path, quick(strict=True), enable_progress_bar=True)
    assert threading.active_count() == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
