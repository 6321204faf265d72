"""Models as others write them: Lightning's own demos, and tiny ones of transformers, in a plain module."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.demos import LightningTransformer, Transformer
from pytorch_lightning.demos.boring_classes import BoringModel, ManualOptimBoringModel, RandomDataset
from pytorch_lightning.demos.lstm import LightningLSTM, SequenceSampler, SimpleLSTM
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from tests.integrations.harness import fit
from tests.integrations.trainings import quick_probe

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS, LENGTH = 24, 8


class Counting(Dataset[Any]):
    """Words that count in threes, a few of them wrong; each sequence with its successor."""

    def __init__(self, count: int = 128) -> None:
        draws = torch.Generator().manual_seed(1)
        starts = torch.randint(WORDS, (count, 1), generator=draws)
        right = (starts + 3 * torch.arange(LENGTH + 1)) % WORDS
        wrong = torch.randint(WORDS, right.shape, generator=draws)
        self.words = torch.where(torch.rand(right.shape, generator=draws) < 1 / 8, wrong, right)
        self.order: list[int] = []

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.order.append(index)
        return self.words[index, :-1], self.words[index, 1:]


def pairs() -> DataLoader[Any]:
    return DataLoader(Counting(), 8, shuffle=True)


def sequences() -> DataLoader[Any]:
    """In the order of the demo's sampler, which makes batches of neighbours."""
    dataset = Counting()
    return DataLoader(dataset, batch_sampler=SequenceSampler(dataset, batch_size=8))


def numbers() -> DataLoader[Any]:
    return DataLoader(RandomDataset(32, 128), 8, shuffle=True)


def without_download(module: Any) -> Any:
    module.prepare_data = lambda: None
    return module


def transformer(base: Any) -> Any:
    module = LightningTransformer(vocab_size=WORDS)
    module.model = Transformer(vocab_size=WORDS, ninp=8, nhid=8, nlayers=1)  # by default a million weights
    return without_download(module)


def lstm(base: Any) -> Any:
    module = LightningLSTM(vocab_size=WORDS)
    module.model = SimpleLSTM(vocab_size=WORDS, ninp=8, nhid=8, nlayers=2)
    return without_download(module)


DEMOS: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "boring": (lambda base: BoringModel(), numbers),
    "boring, by hand": (lambda base: ManualOptimBoringModel(), numbers),
    "transformer": (transformer, pairs),
    "LSTM": (lstm, sequences),
}


def compare(make: Callable[[Any], Any], data: Callable[[], Any], root: Path) -> None:
    """Two windows; the same to the last bit without the probe; modes with residuals, self-test passed."""
    without, _ = fit("pytorch_lightning", make, data, [], root / "without", steps=130)
    probe = quick_probe(strict=True)
    found, _ = fit("pytorch_lightning", make, data, [probe], root / "with", steps=130)
    without.assert_equal(found)
    assert len([result for result in probe.results if result.complete]) == 2
    for result in probe.results:
        assert result.curvature.self_test.startswith("passed"), result.curvature.self_test
        assert all(mode.residual < 0.02 for mode in result.modes if mode.kind.value == "top")


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMOS)
def test_demos_of_lightning(name: str, tmp_path: Path) -> None:
    compare(*DEMOS[name], tmp_path)


# ---- transformers


def gpt2(hf: Any) -> Any:
    sizes = {"n_positions": LENGTH, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=WORDS, bos_token_id=0, eos_token_id=0, **sizes))


def bert(hf: Any) -> Any:
    # A word for padding of its own: autograd holds that row of a table still.
    return hf.BertForMaskedLM(hf.BertConfig(vocab_size=WORDS + 1, pad_token_id=WORDS, **_small()))


def llama(hf: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=WORDS, num_key_value_heads=1, **_small()))


def vit(hf: Any) -> Any:
    sizes = {**_small(), "image_size": 4, "patch_size": 2, "num_channels": 1}
    sizes.pop("max_position_embeddings")
    return hf.ViTForImageClassification(hf.ViTConfig(num_labels=3, **sizes))


def _small() -> dict[str, int]:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return {**sizes, "max_position_embeddings": 16}


def named(samples: Any) -> dict[str, Tensor]:
    """A batch as the models take it."""
    words, _ = default_collate(samples)
    return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words}


def images(samples: Any) -> dict[str, Tensor]:
    words, following = default_collate(samples)
    pixels = torch.cat([words, following], 1).float() / WORDS
    return {"pixel_values": pixels.view(-1, 1, 4, 4), "labels": words[:, 0] % 3}


def wrapped(make: Callable[[Any], Any], hf: Any) -> Callable[[Any], Any]:
    """The model in a module as everybody writes it."""

    def build(base: Any) -> Any:
        class Wrapped(base):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.model = make(hf)

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                outputs = self.model(**batch)
                self.log("train_loss", outputs.loss, prog_bar=True)
                return outputs.loss

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
                schedule = hf.get_linear_schedule_with_warmup(optimizer, 10, 200)
                return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        return Wrapped()

    return build


@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2, bert, llama, vit], ids=lambda make: make.__name__)
def test_models_of_transformers(make: Callable[[Any], Any], tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    collate = images if make is vit else named
    compare(wrapped(make, hf), lambda: DataLoader(Counting(), 8, shuffle=True, collate_fn=collate), tmp_path)
