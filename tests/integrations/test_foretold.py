"""The preflight's message beside what then happened: step, pause, memory and number of windows."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sgd_probe import SGDProbe
from tests.helpers.memory import measurable
from tests.integrations.harness import memory_logger

WIDTH = 384


class Wide(pl.LightningModule):
    """A hundred and fifty thousand weights, so that a window takes memory that can be seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, 4)

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.head(self.net(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)


@pytest.mark.slow
def test_what_is_foretold_happens(tmp_path: Path) -> None:
    probe = SGDProbe(
        top=4, flat=2, window=50, every_n_steps=60, curvature_batches=4, run_dir=tmp_path / "run", strict=True
    )
    logger = memory_logger("pytorch_lightning")
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(2_048, 16, generator=generator), torch.randint(4, (2_048,), generator=generator)
    )
    trainer = pl.Trainer(
        max_steps=200,
        max_epochs=-1,
        accelerator="cpu",
        logger=logger,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[probe],
    )
    trainer.fit(Wide(), DataLoader(data, 32, shuffle=True, generator=generator))
    results = probe.results
    first = results[0].cost

    # The first window, and how many there are.
    assert first.foretold_step == results[0].opened_at_step == 8
    assert math.isnan(results[1].cost.foretold_step)
    assert {result.cost.foretold_windows for result in results} == {float(len(results))}
    # A pause is foretold to within a factor, on machines that have other work to do.
    for result in results:
        assert 0.2 < result.cost.open_seconds / result.cost.foretold_open_seconds < 5
    # The longest is that of the run so far: never less than before, nor than any of the pauses.
    longest = [result.cost.longest_pause_seconds for result in results]
    assert longest == sorted(longest)
    assert longest[-1] >= max(max(result.cost.open_seconds, result.cost.close_seconds) for result in results)
    # Memory is "at most".
    if measurable() and not math.isnan(first.peak_bytes):
        assert first.peak_bytes < 1.2 * first.foretold_bytes + 16 * 2**20

    # The message says the same numbers, and so does every output.
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    said = " ".join(info["plan"])
    assert "at about optimizer step 8 and pauses" in said and f"; {len(results)} over the run" in said
    (megabytes,) = re.findall(r"needs about ([\d,]+) MB", said)
    assert float(megabytes.replace(",", "")) == pytest.approx(first.foretold_bytes / 2**20, abs=1)
    rows = [row for _, row in logger.rows if "sgd_probe/lambda_max" in row]
    assert [row["sgd_probe/cost/longest_pause_seconds"] for row in rows] == pytest.approx(longest)
    assert float(trainer.callback_metrics["sgd_probe/cost/longest_pause_seconds"]) == pytest.approx(
        longest[-1]
    )
    lines = (tmp_path / "run" / "windows.jsonl").read_text().splitlines()
    assert [json.loads(line)["cost"]["longest_pause_seconds"] for line in lines] == longest
