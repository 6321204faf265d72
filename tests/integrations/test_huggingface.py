"""A Trainer with the probe trains as it would without; and the probed loss is the one that it trains on."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.wandb_file import read_wandb_file
from tests.integrations.harness import generators, plain

transformers: Any = pytest.importorskip("transformers")
huggingface: Any = pytest.importorskip("sgd_probe.integrations.huggingface")

Options = dict[str, Any]


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The precision of one trainer is otherwise that of the next of its process, too."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    importlib.import_module("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)


_SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=16, n_positions=12, n_embd=8, n_layer=1, n_head=2)
    )


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=16, num_key_value_heads=1, max_position_embeddings=12, **_SMALL
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    config = transformers.BertConfig(vocab_size=16, max_position_embeddings=12, num_labels=4, **_SMALL)
    return transformers.BertForSequenceClassification(config)


def vit() -> Any:
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, num_labels=2, hidden_dropout_prob=0.1, **_SMALL
    )
    return transformers.ViTForImageClassification(config)


def sequences() -> list[dict[str, Any]]:
    """Counting in threes modulo 16, with a few labels that do not count."""
    draws = torch.Generator().manual_seed(1)
    found = []
    for _ in range(96):
        start, hidden = torch.randint(16, (2,), generator=draws).tolist()
        ids = torch.tensor([(start + 3 * j) % 16 for j in range(8)])
        labels = ids.clone()
        labels[: hidden % 6] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def sentences() -> list[dict[str, Any]]:
    draws = torch.Generator().manual_seed(1)
    drawn = [torch.randint(16, (8,), generator=draws) for _ in range(96)]
    return [{"input_ids": ids, "labels": int(ids[0]) % 4} for ids in drawn]


def pictures() -> list[dict[str, Any]]:
    draws = torch.Generator().manual_seed(1)
    drawn = [torch.randn(1, 8, 8, generator=draws) for _ in range(96)]
    return [{"pixel_values": image, "labels": int(image.mean() > 0)} for image in drawn]


MODELS = {
    "GPT-2": (gpt2, sequences),
    "Llama": (llama, sequences),
    "BERT": (bert, sentences),
    "ViT": (vit, pictures),
}


def quick(**options: Any) -> Options:
    return {
        "top": 2,
        "flat": 1,
        "window": 50,
        "every_n_steps": 60,
        "curvature_batches": 2,
        "strict": True,
        **options,
    }


def make_trainer(
    output: Path,
    model: Callable[[], Any] = gpt2,
    data: Callable[[], list[dict[str, Any]]] = sequences,
    kind: Any = None,
    callbacks: Any = None,
    **arguments: Any,
) -> Any:
    torch.manual_seed(0)
    given = {
        "max_steps": 60,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "log_level": "error",
        "seed": 3,
        **arguments,
    }
    return (kind or transformers.Trainer)(
        model=model(),
        args=transformers.TrainingArguments(output_dir=str(output), **given),
        train_dataset=data(),
        eval_dataset=data()[:8],
        callbacks=callbacks,
    )


def attach(trainer: Any, **options: Any) -> Any:
    return huggingface.SGDProbeCallback.attach(trainer, **quick(**options))


def world(trainer: Any) -> dict[str, Any]:
    """Everything that the probe may not change."""
    times = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    optimizer = trainer.optimizer.optimizer
    return {
        "weights": plain(dict(trainer.model.state_dict())),
        "optimizer": plain([optimizer.state_dict(), sorted(vars(optimizer))]),
        "hooks": [len(hooks) for name, hooks in vars(optimizer).items() if name.endswith("_hooks")],
        "schedule": plain(trainer.lr_scheduler.state_dict()),
        "log": [{k: plain(v) for k, v in row.items() if k not in times} for row in trainer.state.log_history],
        "generators": generators(),
        "trainer": sorted(vars(trainer)),
        "accelerator": sorted(vars(trainer.accelerator)),
        "model": [(sorted(vars(m)), m.training) for m in trainer.model.modules()],
    }


def assert_same(mine: dict[str, Any], its: dict[str, Any]) -> None:
    for name, value in mine.items():
        assert value == its[name], f"{name} differs"


def assert_measured(results: list[Any]) -> None:
    assert results
    for result in results:
        assert {mode.kind.value for mode in result.modes} == {"top", "flat"}
        assert all(0 <= mode.residual < 1 for mode in result.modes)
        assert all(math.isfinite(mode.held_out_eigenvalue) for mode in result.modes)
        assert abs(result.curvature.lambda_max) > 1e-3
        # Norms, attention and losses in float32 are kept in float64 where the self-test needs it.
        assert result.curvature.self_test.startswith("passed")


@pytest.mark.parametrize("name", MODELS)
def test_a_trainer_with_the_probe_is_bit_identical(name: str, tmp_path: Path) -> None:
    model, data = MODELS[name]
    without = make_trainer(tmp_path, model, data)
    without.train()
    trainer = make_trainer(tmp_path, model, data)
    probe = attach(trainer, run_dir=tmp_path / "run")
    trainer.train()
    assert_same(world(without), world(trainer))
    assert_measured(probe.results)
    (result,) = probe.results
    assert result.steps == 50 and result.complete
    assert "AdamW" in result.optimizer and "without replacement" in result.sampling
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 3, "lr_scheduler_type": "cosine", "warmup_steps": 5},
        {"optim": "sgd", "label_smoothing_factor": 0.1, "dataloader_drop_last": True},
        {"bf16": True, "eval_strategy": "steps", "eval_steps": 7},
    ],
)
def test_so_it_is_with_other_arguments(arguments: Options, tmp_path: Path) -> None:
    found = []
    for probed in (False, True):
        trainer = make_trainer(tmp_path, **arguments)
        probe = attach(trainer) if probed else None
        trainer.train()
        rows = world(trainer)
        rows["log"] = [
            {k: v for k, v in row.items() if not k.startswith("eval_") or k == "eval_loss"}
            for row in rows["log"]
        ]
        found.append(rows)
    assert_same(*found)
    assert probe is not None
    assert_measured(probe.results)


class Careful:
    """A trainer whose loss counts, logs and keeps lists."""

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        vars(self).setdefault("calls", 0)
        vars(self).setdefault("seen", {}).setdefault("loss", [])
        self.calls += 1
        loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.seen["loss"].append(loss.item())
        if self.calls % 5 == 0:
            self.log({"mine": float(self.calls)})
        return loss * (1 + 1e-4 * self.calls)


def test_what_a_loss_of_the_users_keeps_is_put_back(tmp_path: Path) -> None:
    kind = type("CarefulTrainer", (Careful, transformers.Trainer), {})
    found = []
    for probed in (False, True):
        trainer = make_trainer(tmp_path, kind=kind)
        probe = attach(trainer) if probed else None
        trainer.train()
        found.append(world(trainer) | {"calls": trainer.calls, "seen": trainer.seen})
    assert_same(*found)
    assert probe is not None and probe.results


def test_the_probed_loss_is_the_models_own(tmp_path: Path) -> None:
    def loss_fn(model: Any, inputs: Any) -> Tensor:
        loss: Tensor = model(**inputs).loss
        return loss

    found = []
    for options in ({}, {"loss_fn": loss_fn}):
        trainer = make_trainer(tmp_path, bert, sentences)
        probe = attach(trainer, **options)
        trainer.train()
        found.append([mode.held_out_eigenvalue for mode in probe.results[0].modes])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("model", [gpt2, bert])
def test_probed_losses_of_a_step_add_up_to_its_gradient(model: Callable[[], Any], tmp_path: Path) -> None:
    """Batches have different numbers of tokens that count, and the last step gathers fewer of them."""
    trainer = make_trainer(
        tmp_path,
        model,
        {gpt2: sequences, bert: sentences}[model],
        gradient_accumulation_steps=5,
        max_grad_norm=0.0,
        max_steps=6,  # five of an epoch's 24 batches make a step, four the last
    )
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    loss, step = huggingface._training_loss(trainer, None), trainer.training_step
    given: list[Any] = []
    apart: list[float] = []

    def training_step(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        gathered = trainer.current_gradient_accumulation_steps
        given.append(huggingface.Given(dict(inputs), rest, named, gathered))
        return step(model, inputs, *rest, **named)

    class Compare(transformers.TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            used = [p.grad.clone() for p in trainer.model.parameters()]
            total = sum(loss(trainer.model, batch, 0) for batch in given) / len(given)
            expected = torch.autograd.grad(total, list(trainer.model.parameters()))
            for mine, its in zip(used, expected, strict=True):
                apart.append(float((mine - its).norm() / its.norm().clamp_min(1e-6)))
            gathers.append(len(given))
            given.clear()

    gathers: list[int] = []
    trainer.training_step = training_step
    trainer.add_callback(Compare())
    trainer.train()
    assert gathers == [5, 5, 5, 5, 4, 5]
    assert max(apart) < 1e-4


def failing(stage: str) -> Any:
    """A trainer whose loss fails for the probe at a stage of its work."""

    class Failing(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            due = {"plan": 0, "opening": 1, "closing": 20}[stage]
            if "backward" in vars(self.accelerator) and self.state.global_step >= due:
                raise RuntimeError("no loss today")
            return super().compute_loss(*args, **kwargs)

    return Failing


@pytest.mark.parametrize("stage", ["plan", "opening", "closing"])
def test_a_failure_is_warned_of_once_and_training_goes_on(
    stage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without = make_trainer(tmp_path)
    without.train()
    trainer = make_trainer(tmp_path, kind=failing(stage))
    probe = attach(trainer, strict=False)
    trainer.train()
    assert_same(world(without), world(trainer))
    ours = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name == "sgd_probe"]
    assert len(ours) == 1 and "no loss today" in ours[0]
    assert not probe.results

    strict = make_trainer(tmp_path, kind=failing(stage))
    attach(strict)
    with pytest.raises(RuntimeError, match="no loss today"):
        strict.train()


def test_batches_of_a_tokenizers_collator_are_copied(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: transformers.BatchEncoding(collate(rows))
    probe = attach(trainer)
    trainer.train()
    assert_measured(probe.results)


def test_a_step_that_goes_backward_by_itself_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(transformers.Trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            model.train()
            loss = self.compute_loss(model, inputs)
            loss.backward()
            return loss.detach()

    found = []
    for options in (None, {}, {"loss_fn": lambda model, inputs: model(**inputs).loss}):
        trainer = make_trainer(tmp_path, kind=Own)
        probe = None if options is None else attach(trainer, strict=False, **options)
        trainer.train()
        found.append(world(trainer))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    assert "one loss to accelerator.backward" in caplog.text
    assert probe is not None
    assert_measured(probe.results)


def test_pieces_of_a_batch_that_shares_its_number_of_tokens_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    attach(trainer, config=huggingface.ProbeConfig(microbatch=2))
    with pytest.raises(RuntimeError, match="means over its pieces"):
        trainer.train()


def test_a_training_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    class Failing(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 9:
                raise ZeroDivisionError
            return super().compute_loss(*args, **kwargs)

    trainer = make_trainer(tmp_path, kind=Failing)
    probe = attach(trainer)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert "training_step" not in vars(trainer)
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks
    assert not probe.results


def test_the_last_window_closes_before_the_best_model_is_loaded(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=20,
        save_steps=20,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that it is not the last
        save_only_model=True,
    )
    probe = attach(trainer, window=100, every_n_steps=100)
    trainer.train()
    assert not trainer.state.best_model_checkpoint.endswith("checkpoint-60")
    (result,) = probe.results
    assert not any("outside the optimizer's steps" in warning for warning in result.warnings)
    assert all(math.isfinite(mode.end_eigenvalue) for mode in result.modes)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_can_train_twice(bf16: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, bf16=bf16)
    probe = attach(trainer)
    for _ in range(2):
        trainer.train()
        assert_measured(probe.results)
        assert "float32 product" in probe.results[0].curvature.self_test
    assert (tmp_path / "sgd_probe_run_1" / "report.html").exists()


def test_a_probe_that_is_not_attached_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, callbacks=[huggingface.SGDProbeCallback()], max_steps=1)
    trainer.train()
    assert "SGDProbeCallback.attach(trainer)" in caplog.text


def test_attaching_again_replaces(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    attach(trainer)
    probe = attach(trainer)
    kept = [c for c in trainer.callback_handler.callbacks if isinstance(c, huggingface.SGDProbeCallback)]
    assert kept == [probe]


def test_half_precision_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, lambda: gpt2().to(torch.bfloat16), max_steps=2)
    attach(trainer, strict=False)
    trainer.train()
    assert "weights in bfloat16 are too coarse" in caplog.text


@pytest.mark.parametrize(
    ("done", "gathered", "batches", "skipped"), [(0, 1, 24, 0), (30, 1, 24, 6), (7, 5, 24, 10), (5, 5, 24, 0)]
)
def test_a_resumed_epoch_is_counted_from_where_it_was(
    done: int, gathered: int, batches: int, skipped: int
) -> None:
    arguments = SimpleNamespace(ignore_data_skip=False, gradient_accumulation_steps=gathered)
    state = SimpleNamespace(global_step=done)
    assert huggingface._batches_skipped(arguments, state, range(batches)) == skipped


def test_a_resumed_training_is_probed_and_stays_the_same(tmp_path: Path) -> None:
    found = []
    for probed in (False, True):
        first = make_trainer(tmp_path / str(probed), save_strategy="steps", save_steps=10, max_steps=70)
        first.train()
        trainer = make_trainer(tmp_path / str(probed), max_steps=70)
        probe = attach(trainer) if probed else None
        trainer.train(resume_from_checkpoint=str(tmp_path / str(probed) / "checkpoint-10"))
        found.append(world(trainer))
    assert_same(*found)
    assert probe is not None
    assert probe.results[0].opened_at_step == 14


def test_rows_in_wandb_are_on_the_trainers_axis(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    quiet = wandb.Settings(x_disable_stats=True, x_disable_meta=True, console="off", silent=True)
    run = wandb.init(project="p", dir=tmp_path, mode="offline", settings=quiet)
    trainer = make_trainer(tmp_path / "out", max_steps=80)
    probe = attach(trainer, window=50, every_n_steps=60)
    trainer.train()
    run.finish()
    (path,) = tmp_path.rglob("run-*.wandb")
    logged = read_wandb_file(path)
    ours = [row for row in logged.history if "sgd_probe/lambda_max" in row]
    assert [row["train/global_step"] for row in ours] == [result.closed_at_step for result in probe.results]
    assert len(ours) >= 1
    assert "trainer/global_step" not in ours[0]
    assert logged.step_metrics["sgd_probe/lambda_max"] == "train/global_step"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "`top`"),
        ({"name": ""}, "`name`"),
        ({"loss_fn": 3}, "`loss_fn`"),
        ({"on_flag": 3}, "`on_flag`"),
    ],
)
def test_a_wrong_argument_is_named(options: Options, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"expected {message}"):
        huggingface.SGDProbeCallback(**options)
