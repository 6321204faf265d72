"""The probe in a Hugging Face Trainer: a tiny GPT-2 learns to count in threes, with AdamW.

It trains twice, without the probe and with it, shows that both end at the same weights to the last bit,
prints the modes of the last window, and writes a report. Offline, on a processor; nothing is downloaded.

    pip install ".[huggingface]"
    python examples/huggingface.py            # about half a minute
    python examples/huggingface.py --quick
"""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _common import assert_same_bits, options, stiff_modes
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from sgd_probe import Verdict, WindowResult
from sgd_probe.integrations.huggingface import SGDProbeCallback

LETTERS, LENGTH = 24, 12


def sequences() -> list[dict[str, Any]]:
    """Counting in threes from anywhere, with one letter in eight wrong: there is noise that stays."""
    draws = torch.Generator().manual_seed(1)
    starts = torch.randint(LETTERS, (512, 1), generator=draws)
    right = (starts + 3 * torch.arange(LENGTH)) % LETTERS
    wrong = torch.randint(LETTERS, right.shape, generator=draws)
    ids = torch.where(torch.rand(right.shape, generator=draws) < 1 / 8, wrong, right)
    return [{"input_ids": row, "labels": row} for row in ids]


def train(steps: int, window: int, arguments: Namespace, probed: bool) -> tuple[Trainer, list[WindowResult]]:
    torch.manual_seed(arguments.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=LETTERS,
            n_positions=LENGTH,
            n_embd=16,
            n_layer=2,
            n_head=2,
            # Dropout is noise that an epoch of shuffled batches does not cancel: verdicts would be withheld.
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.output),
            seed=arguments.seed,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=100,
            disable_tqdm=True,
            log_level="error",
        ),
        train_dataset=sequences(),
    )
    if not probed:
        trainer.train()
        return trainer, []
    probe = SGDProbeCallback.attach(
        trainer, top=6, flat=2, window=window, every_n_steps=window + 50, curvature_batches=4
    )
    trainer.train()
    return trainer, probe.results


def main() -> None:
    arguments = options(__file__, __doc__)
    steps, window = (480, 200) if arguments.quick else (1300, 600)

    without, _ = train(steps, window, arguments, probed=False)
    trainer, results = train(steps, window, arguments, probed=True)
    assert_same_bits(without.model, trainer.model)

    last = results[-1]
    stiff = stiff_modes(last)
    confined = [mode for mode in stiff if mode.verdict is Verdict.CONFINED]
    assert len(confined) >= 3
    assert last.coordinates == "weights in AdamW's preconditioned coordinates"
    assert last.index >= 1 and last.complete and last.steps == window
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    print(f"Training loss {losses[0]:.3f} -> {losses[-1]:.3f}.")
    print(f"{len(confined)} of {len(stiff)} stiff modes are confined.")


if __name__ == "__main__":
    main()
