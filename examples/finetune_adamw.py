"""Fine-tuning with AdamW: is it enough to watch the last layers?

A character transformer learns Python sources and is fine-tuned on English, the documentation of the
language. Two probes watch that: one all weights, one the last block and the head alone (``params=``),
with half as many numbers a direction. The largest curvature among some weights is never above that among
all of them, and the ratio says how much is missed. The script shows that both probes leave the training
alone to the last bit, prints the modes of both, and writes two reports. Offline, on a processor; nothing
is downloaded.

    python examples/finetune_adamw.py            # about a minute
    python examples/finetune_adamw.py --quick
"""

from __future__ import annotations

import argparse
import ast
import copy
from pydoc_data import topics

import pytorch_lightning as pl
from _common import QUIET, assert_same_bits, options, stiff_modes
from char_transformer import CharTransformer, Text

from sgd_probe import SGDProbe, Verdict


def fit(model: CharTransformer, text: Text, steps: int, probes: list[SGDProbe]) -> CharTransformer:
    trainer = pl.Trainer(max_epochs=1, callbacks=[*probes], **QUIET)
    trainer.fit(model, text.loader(steps))
    return model


def main() -> None:
    arguments = options(__file__, __doc__)
    steps = 220 if arguments.quick else 1200
    pl.seed_everything(arguments.seed, verbose=False)
    pretrained = fit(CharTransformer(), Text([argparse, ast]), steps, [])

    def probe(name: str, params: list[str] | None = None) -> SGDProbe:
        return SGDProbe(
            top=4,
            flat=2,
            params=params,
            name=name,
            every_n_steps=steps // 2,
            curvature_batches=2,
            run_dir=arguments.output / name,
        )

    probes = [probe("all"), probe("last", ["blocks.layers.1.*", "blocks.norm.*", "head.*"])]
    tuned = []
    for watching in ([], probes):
        pl.seed_everything(arguments.seed, verbose=False)
        model = copy.deepcopy(pretrained)
        model.learning_rate = 5e-4
        tuned.append(fit(model, Text([topics]), steps, watching))
    assert_same_bits(*tuned)

    everything, part = probes[0].results[-1], probes[1].results[-1]
    assert everything.opened_at_step == part.opened_at_step
    for window in (everything, part):
        assert sum(mode.verdict is Verdict.CONFINED for mode in stiff_modes(window)) >= 3
    assert all(
        name.startswith(("blocks.layers.1", "blocks.norm", "head"))
        for mode in part.modes
        for name in mode.layer_shares
    )
    # Cauchy's interlacing: a principal block of a symmetric matrix has no larger eigenvalue than the whole.
    share = part.curvature.lambda_max / everything.curvature.lambda_max
    assert 0 < share < 1.01
    print(
        f"Among the last layers' {part.curvature.parameters:,} of {everything.curvature.parameters:,} "
        f"weights, the largest curvature is {share:.0%} of that among all."
    )


if __name__ == "__main__":
    main()
