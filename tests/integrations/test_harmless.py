"""Training with the probe is the training without it, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sgd_probe import SGDProbe
from tests.integrations.harness import PACKAGES, RecordingDataset, batchnorm, fit, loader, mlp


def mlp_data() -> Any:
    return loader(RecordingDataset((6,)), replacement=True)


def shuffled_mlp_data() -> Any:
    return loader(RecordingDataset((6,)), replacement=False, batch_size=24)


def image_data() -> Any:
    return loader(RecordingDataset((1, 6, 6), augment=True), replacement=True)


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mlp_dropout_metric": (mlp, mlp_data, {}),
    "batchnorm_augmentation": (batchnorm, image_data, {}),
    "clipped_accumulated": (mlp, mlp_data, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 3}),
    "value_clipping_shuffled": (
        mlp,
        shuffled_mlp_data,
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    ),
    "float64": (mlp, mlp_data, {"precision": "64-true"}),
    "bf16_mixed": (mlp, mlp_data, {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("case", CASES)
def test_training_with_the_probe_is_bit_identical(case: str, package: str, tmp_path: Path) -> None:
    make_module, make_loader, options = CASES[case]
    without, _ = fit(package, make_module, make_loader, [], tmp_path / "without", **options)
    probe = SGDProbe(top=3, flat=2, window=60, every_n_steps=80, curvature_batches=2, strict=True)
    with_probe, trainer = fit(package, make_module, make_loader, [probe], tmp_path / "with", **options)
    assert len(probe.results) >= 2, "two windows must have closed for this to show anything"
    assert all(result.steps >= 60 for result in probe.results[:2])
    assert all(len(result.modes) == 5 for result in probe.results)
    without.assert_equal(with_probe)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks, "the hook on the optimizer stayed"
    assert "log" not in vars(trainer.lightning_module)


def test_the_fingerprint_sees_a_probe_that_draws_one_random_number(tmp_path: Path) -> None:
    """The comparison must be able to fail."""
    import torch

    class Careless(PACKAGES["pytorch_lightning"].Callback):  # type: ignore[misc]
        def on_train_batch_end(self, *args: Any) -> None:
            if args[-1] == 5:
                torch.rand(())

    without, _ = fit("pytorch_lightning", mlp, mlp_data, [], tmp_path / "a", steps=40)
    careless, _ = fit("pytorch_lightning", mlp, mlp_data, [Careless()], tmp_path / "b", steps=40)
    with pytest.raises(AssertionError):
        without.assert_equal(careless)
