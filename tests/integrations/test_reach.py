"""What a training step may do outside its arithmetic, and the probe must not do once more."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset, default_collate

from sgd_probe import SGDProbe, Verdict
from tests.integrations.harness import RecordingDataset, fit, loader, mlp
from tests.integrations.test_callback import Tiny, data, quick_probe, run

Deed = Callable[[Any, Tensor], Any]


def module_with(deed: Deed, **attributes: Any) -> Callable[[Any], Any]:
    """A module whose training step does something on the side and returns the loss."""

    def make(base: Any) -> Any:
        class Module(base):  # type: ignore[misc]
            shared: dict[str, int] = {"calls": 0}  # noqa: RUF012  (people do keep state on the class)

            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(6, 4)
                for name, value in attributes.items():
                    setattr(self, name, copy.copy(value))

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss: Tensor = nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
                return deed(self, loss)

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.05)

        return Module()

    return make


def stop_at(self: Any, loss: Tensor) -> Tensor:
    if float(loss.detach()) < 0.35:
        self.trainer.should_stop = True
    return loss


def decay_rate(self: Any, loss: Tensor) -> Tensor:
    for group in self.trainer.optimizers[0].param_groups:
        group["lr"] *= 0.999
    return loss


def count_on_class(self: Any, loss: Tensor) -> Tensor:
    type(self).shared["calls"] += 1
    calls: int = type(self).shared["calls"]
    return loss * (1 + 1e-4 * calls)


def append_bytes(self: Any, loss: Tensor) -> Tensor:
    self.trace.append(1)
    return loss * (1 + 1e-4 * len(self.trace))


CALLS = 0
SEEN: list[float] = []
NOISE = np.random.default_rng(0)


def jitter() -> float:
    """A helper, as people have them at the top of their file, beside its generator."""
    SEEN.append(float(NOISE.normal()))
    return 1 + 1e-3 * SEEN[-1]


def keep_globals(self: Any, loss: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return loss * jitter() * (1 + 1e-4 * CALLS)


class Counter(pl.Callback):
    calls = 0


def count_elsewhere(self: Any, loss: Tensor) -> Any:
    """On a callback, and on the trainer itself."""
    (counter,) = (callback for callback in self.trainer.callbacks if isinstance(callback, Counter))
    counter.calls += 1
    self.trainer.calls = getattr(self.trainer, "calls", 0) + 1
    return loss * (1 + 1e-4 * counter.calls + 1e-5 * self.trainer.calls)


@pytest.mark.parametrize(
    ("deed", "attributes"),
    [
        (stop_at, {}),
        (decay_rate, {}),
        (count_on_class, {}),
        (append_bytes, {"trace": bytearray()}),
        (keep_globals, {}),
        (count_elsewhere, {}),
    ],
)
def test_it_is_done_once_only(
    deed: Deed, attributes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, found, rates = module_with(deed, **attributes), [], []
    probe = quick_probe(strict=True)
    for name, probes in (("without", []), ("with", [probe])):
        for attribute, fresh in (("CALLS", 0), ("SEEN", []), ("NOISE", np.random.default_rng(0))):
            monkeypatch.setitem(globals(), attribute, fresh)
        fingerprint, trainer = fit("pytorch_lightning", make, data, [Counter(), *probes], tmp_path / name)
        found.append(fingerprint)
        rates.append([trainer.optimizers[0].param_groups[0]["lr"], CALLS, list(SEEN)])
    assert probe.results
    found[0].assert_equal(found[1])
    assert rates[0] == rates[1]


def draw(self: Any, loss: Tensor) -> Tensor:
    scaled: Tensor = loss * next(self.stream)
    return scaled


@pytest.mark.parametrize("kind", ["cycle", "loader", "generator"])
def test_an_iterator_on_the_module_is_never_consumed(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make(base: Any) -> Any:
        module = module_with(draw)(base)
        factors = [0.5, 1.0, 2.0]
        streams: dict[str, Any] = {
            "cycle": itertools.cycle(factors),
            "loader": DataLoader(TensorDataset(torch.ones(400)), collate_fn=len).__iter__(),
            "generator": (factor for factor in factors * 200),
        }
        module.stream = streams[kind]
        return module

    without, _ = fit("pytorch_lightning", make, data, [], tmp_path / "a")
    with_probe, trainer = fit("pytorch_lightning", make, data, [quick_probe()], tmp_path / "b")
    without.assert_equal(with_probe)
    assert "`stream`" in caplog.text
    assert "loss_fn" in caplog.text
    assert type(trainer.lightning_module.stream).__name__ != "_Untouchable"


class LockedBatch:
    """A batch that refuses to be copied."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels, self.lock = inputs, labels, threading.Lock()


def test_a_batch_that_cannot_be_copied_keeps_the_probe_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class OnLocked(Tiny):
        def training_step(self, batch: LockedBatch, batch_idx: int) -> Tensor:
            batch.inputs.mul_(0.9)
            return super().training_step((batch.inputs, batch.labels), batch_idx)

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            return batch

    def locked() -> DataLoader[Any]:
        dataset = RecordingDataset((6,))
        sampler = RandomSampler(dataset, replacement=True)
        return DataLoader(
            dataset, batch_size=16, sampler=sampler, collate_fn=lambda x: LockedBatch(*default_collate(x))
        )

    def make(base: Any) -> Any:
        return OnLocked()

    without, _ = fit("pytorch_lightning", make, locked, [], tmp_path / "a", steps=60)
    found, _ = fit("pytorch_lightning", make, locked, [quick_probe()], tmp_path / "b", steps=60)
    without.assert_equal(found)
    assert "expected a batch that can be copied" in caplog.text


def test_weights_reached_around_the_module_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Listed(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.penalised = [self.layer.weight]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + sum(w.square().sum() for w in self.penalised)

    probe = quick_probe()
    assert run(Listed(), probe, tmp_path).global_step == 200
    assert probe.results == []
    assert "layer.weight" in caplog.text


def test_a_stream_of_unknown_length_gets_windows(tmp_path: Path) -> None:
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            generator = torch.Generator().manual_seed(3)
            for _ in range(16 * 100):
                yield torch.randn(6, generator=generator), torch.randint(4, (), generator=generator)

    probe = quick_probe(strict=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[probe],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Tiny(), DataLoader(Stream(), batch_size=16))
    assert len(probe.results) >= 2
    assert all("sampling" in warning or "draws" in warning for warning in probe.results[0].warnings[:1])


def test_clipping_does_not_make_a_mode_noiseless(tmp_path: Path) -> None:
    for clip in (None, 0.02):
        probe = quick_probe(strict=True)
        fit("pytorch_lightning", mlp, data, [probe], tmp_path, gradient_clip_val=clip)
        for result in probe.results:
            assert result.counts()[Verdict.NO_NOISE] == 0
            assert max(mode.noise_share for mode in result.modes) > 0.5


def test_an_sgd_with_a_step_of_its_own_gets_no_verdicts(tmp_path: Path) -> None:
    class SignSGD(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = closure() if closure is not None else None
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.sub_(group["lr"] * parameter.grad.sign())
            return loss

    class Signed(Tiny):
        def configure_optimizers(self) -> Any:
            return SignSGD(self.parameters(), lr=1e-3)

    probe = quick_probe(strict=True)
    run(Signed(), probe, tmp_path)
    assert any("SignSGD" in warning for warning in probe.results[0].warnings)
    assert {m.verdict for m in probe.results[0].modes} <= {Verdict.UNDETERMINED, Verdict.NO_NOISE}


def test_a_hook_of_the_users_that_zeroes_gradients_comes_after_ours(tmp_path: Path) -> None:
    class Zeroing(Tiny):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
            return optimizer

    probe = quick_probe(strict=True)
    run(Zeroing(), probe, tmp_path)
    assert probe.results[0].skipped_steps == 0


class Wrapping(torch.optim.Optimizer):
    """Steps by another optimizer, and never calls the constructor of torch."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state
        self.defaults = inner.defaults
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def test_an_optimizer_without_hooks_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Averaged(Tiny):
        def configure_optimizers(self) -> Any:
            return Wrapping(torch.optim.SGD(self.parameters(), lr=0.05))

    probe = quick_probe()
    assert run(Averaged(), probe, tmp_path, steps=20).global_step == 20
    assert probe.results == []
    assert "found a Wrapping without step hooks" in caplog.text


def test_an_optimizer_that_is_replaced_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Restarting(Tiny):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 70:
                self.trainer.strategy.setup_optimizers(self.trainer)

    probe = quick_probe()
    run(Restarting(), probe, tmp_path)
    assert len(probe.results) == 1
    assert caplog.text.count("told nothing") == 1


def test_a_module_without_an_optimizer_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Still(Tiny):
        def configure_optimizers(self) -> Any:
            return None

    run(Still(), quick_probe(strict=True), tmp_path)
    assert "the optimizer moves no weights" in caplog.text


def test_curvature_sets_that_must_overlap_say_so(tmp_path: Path) -> None:
    probe = quick_probe(strict=True)
    run(Tiny(), probe, tmp_path, overfit_batches=1)
    assert any("may share samples" in warning for warning in probe.results[0].warnings)


def test_a_second_probe_of_one_name_stands_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second, third = quick_probe(), quick_probe(), quick_probe(name="heads", params="*.bias", flat=0)
    run(Tiny(), first, tmp_path, callbacks=[second, third])
    assert len(first.results) == 2
    assert second.results == []
    assert len(third.results) == 2
    assert "give each its own" in caplog.text


def test_a_probe_can_be_copied_and_pickled_while_it_runs(tmp_path: Path) -> None:
    class Copying(Tiny):
        copies: list[SGDProbe] = []  # noqa: RUF012

        def on_train_batch_end(self, *args: Any) -> None:
            if self.global_step == 20:
                probe = next(c for c in self.trainer.callbacks if isinstance(c, SGDProbe))  # type: ignore[attr-defined]
                copies.extend([copy.deepcopy(probe), pickle.loads(pickle.dumps(probe))])

    copies: list[SGDProbe] = []
    probe = quick_probe(strict=True)
    run(Copying(), probe, tmp_path)
    assert len(probe.results) == 2
    assert [twin.config for twin in copies] == [probe.config] * 2


def test_printing_and_cached_writers_stay_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Talkative(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            print("step!")
            return super().training_step(batch, batch_idx)

    run(Talkative(), quick_probe(strict=True), tmp_path)
    assert capsys.readouterr().out.count("step!") == 200


def test_the_loader_of_the_harness_draws_with_replacement() -> None:
    assert isinstance(loader(RecordingDataset((6,))).sampler, RandomSampler)


def test_a_dataset_on_the_module_is_not_copied(tmp_path: Path) -> None:
    class Large(Dataset[Any]):
        def __init__(self) -> None:
            self.table = torch.zeros(10)

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

        def __len__(self) -> int:
            return 10

    class Holding(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.data = Large()

    run(Holding(), quick_probe(strict=True), tmp_path)
