"""The operator beside dense float64 Hessians, and what it must leave alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.hessian import (
    CurvatureError,
    HessianOperator,
    LossFunction,
    gradient_noise_trace,
    measure_gradient,
)
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.isolation import isolated
from tests.helpers.dense import dense_hessian, freeze

SIZES = (8, 5, 3)  # unequal on purpose


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 6, bias=False)
        self.decode = nn.Linear(6, 3)
        self.again = self.encode

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.decode(self.again(self.encode(x).tanh()).tanh()))


class PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 3)
        self.unused = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.used(x).tanh())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def relu() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def normalised() -> nn.Module:
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5))
    return nn.Sequential(spectral, nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "relu": relu,
    "dropout": dropout,
    "convolution": convolution,
    "tied": Tied,
    "partly used": PartlyUsed,
    "normalised": normalised,
}


def cross_entropy(module: nn.Module, batch: Any, index: int) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def contents(
    dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = SIZES
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for size in sizes
    ]


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(11)
    return MODELS[name]().to(dtype).train()


def columns(operator: HessianOperator) -> Tensor:
    identity = torch.eye(operator.size, dtype=operator.space.dtype)
    return torch.stack([operator.matvec(row) for row in identity])


def probe(
    module: nn.Module, loss: LossFunction, batches: list[CurvatureBatch], retain_graph: bool = True
) -> Tensor:
    """The whole matrix, by products with unit vectors."""
    with (
        isolated(module),
        HessianOperator(module, loss, batches, ParameterSpace.of(module), retain_graph) as operator,
    ):
        return columns(operator)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_hessian(name: str) -> None:
    module, batches = build(name), freeze(contents())
    expected = dense_hessian(module, cross_entropy, batches, ParameterSpace.of(module).names)

    found = probe(module, cross_entropy, batches)

    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found, found.T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_rebuilt_graphs_give_the_very_same_products(name: str) -> None:
    module, batches = build(name), freeze(contents())
    kept, rebuilt = (probe(module, cross_entropy, batches, retain) for retain in (True, False))
    assert torch.equal(kept, rebuilt)


@pytest.mark.parametrize("name", ["mlp", "convolution", "tied"])
def test_float32_is_as_good_as_float32_can_be(name: str) -> None:
    module, batches = build(name, torch.float32), freeze(contents(torch.float32))
    expected = dense_hessian(module, cross_entropy, batches, ParameterSpace.of(module).names)

    found = probe(module, cross_entropy, batches).double()

    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_batches_count_by_their_samples() -> None:
    module, pieces = build("mlp"), contents()
    whole = (torch.cat([x for x, _ in pieces]), torch.cat([y for _, y in pieces]))

    split = probe(module, cross_entropy, freeze(pieces))

    torch.testing.assert_close(split, probe(module, cross_entropy, freeze([whole])), rtol=1e-9, atol=1e-12)


def test_parts_add_up_to_the_whole() -> None:
    module = build("mlp")
    batches, space = freeze(contents()), ParameterSpace.of(module)
    vector = torch.randn(space.size, dtype=torch.float64)
    with isolated(module), HessianOperator(module, cross_entropy, batches, space) as operator:
        parts = list(operator.matvec_per_batch(vector))
        gradients = list(operator.gradients())
        total = operator.matvec(vector)
        assert operator.products == 2
    assert [weight for weight, _ in parts] == [size / sum(SIZES) for size in SIZES]
    torch.testing.assert_close(sum((w * p for w, p in parts), torch.zeros(())), total)
    assert [weight for weight, _ in gradients] == [weight for weight, _ in parts]
    assert operator.samples == sum(SIZES)


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature() -> None:
    module = nn.Linear(6, 1).double()
    found = probe(module, lambda module, batch, index: module(batch[0]).mean(), freeze(contents()))
    assert torch.equal(found, torch.zeros(7, 7, dtype=torch.float64))


def test_a_chosen_part_is_a_block_of_the_whole() -> None:
    module, batches = build("mlp"), freeze(contents())
    whole = ParameterSpace.of(module)
    dense = dense_hessian(module, cross_entropy, batches, whole.names)
    space = ParameterSpace.of(module, ["2.*"])
    block = whole.slices[whole.names.index("2.weight")].start
    with isolated(module), HessianOperator(module, cross_entropy, batches, space) as operator:
        torch.testing.assert_close(columns(operator), dense[block:, block:], rtol=1e-9, atol=1e-12)


class Stepper(nn.Module):
    """What training steps do besides computing a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(6, 3)
        self.teacher = nn.Linear(6, 3).requires_grad_(False)
        self.prototypes = nn.Linear(3, 3, bias=False)
        self.steps = 0
        self.noise = torch.Generator().manual_seed(5)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight))
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
            self.teacher.bias.data = self.teacher.bias.data + 0.1
        self.steps += 1
        features = self.student(x) + torch.randn(3, generator=self.noise)
        distance = (features - self.teacher(x)).tanh().square().mean()
        loss: Tensor = self.steps * distance + F.cross_entropy(self.prototypes(features.tanh()), y)
        return loss


def step(module: nn.Module, batch: Any, index: int) -> Tensor:
    return cast(Stepper, module).training_step(batch, index)


@pytest.mark.parametrize("retain_graph", [True, False])
def test_a_step_that_edits_weights_counts_and_draws_gives_one_and_the_same_hessian(
    retain_graph: bool,
) -> None:
    torch.manual_seed(0)
    module, batches = Stepper().double(), freeze(contents())
    before = copy.deepcopy(module)
    places = [parameter.data_ptr() for parameter in module.parameters()]
    expected = dense_with_clones(module, batches)

    torch.testing.assert_close(probe(module, step, batches, retain_graph), expected, rtol=1e-9, atol=1e-11)

    assert [parameter.data_ptr() for parameter in module.parameters()] == places
    for now, then in zip(module.parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then)
    assert module.steps == 0
    assert torch.equal(module.noise.get_state(), before.noise.get_state())


class Jacobian(nn.Module):
    """A loss of all derivatives of its outputs by its inputs, taken at once."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 4), layer, nn.Linear(4, 3))


def by_inputs(module: nn.Module, batch: Any, index: int) -> Tensor:
    inputs = batch[0] if batch[0].requires_grad else batch[0].requires_grad_()
    outputs = cast(Jacobian, module).layers(inputs).sum(0)
    (slopes,) = torch.autograd.grad(
        outputs, inputs, torch.eye(3, dtype=outputs.dtype), is_grads_batched=True, create_graph=True
    )
    return cast(Tensor, slopes.square().sum(2).sqrt().mean())


@pytest.mark.parametrize("layer", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Tanh()], ids=str)
def test_a_loss_that_takes_many_gradients_at_once(layer: nn.Module) -> None:
    torch.manual_seed(0)
    module, batches = Jacobian(layer).double(), freeze(contents())
    expected = dense_hessian(module, by_inputs, batches, ParameterSpace.of(module).names)
    torch.testing.assert_close(probe(module, by_inputs, batches), expected, rtol=1e-9, atol=1e-11)


def test_inputs_that_need_a_gradient_keep_needing_it() -> None:
    def slope(module: nn.Module, batch: Any, index: int) -> Tensor:
        outputs = cast(Tensor, module(batch[0]))
        (slope,) = torch.autograd.grad(outputs.sin().sum(), batch[0], create_graph=True)
        return cast(Tensor, slope.square().mean())

    module, pieces = build("mlp"), contents()
    given = freeze([(inputs.requires_grad_(), labels) for inputs, labels in pieces])

    def needing(module: nn.Module, batch: Any, index: int) -> Tensor:
        return slope(module, (batch[0].requires_grad_(), batch[1]), index)

    expected = dense_hessian(module, needing, freeze(contents()), ParameterSpace.of(module).names)
    torch.testing.assert_close(probe(module, slope, given), expected, rtol=1e-9, atol=1e-11)


class Gain(nn.Parameter):
    """A parameter of a user's own kind."""


class Marked(nn.Module):
    """What people ask of parameters beside their values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.gain = Gain(torch.tensor(1.5))
        self.gain.slack = 0.3  # type: ignore[attr-defined]
        self.last.weight.no_decay = True  # type: ignore[attr-defined]

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        self.again.weight = self.first.weight  # tied once more at every step
        assert isinstance(self.gain, Gain)
        gain = self.gain + self.gain.slack  # type: ignore[attr-defined]
        decay = [
            parameter.square().sum()
            for parameter in self.parameters()
            if isinstance(parameter, nn.Parameter) and not getattr(parameter, "no_decay", False)
        ]
        logits = self.last(gain * self.again(self.first(batch[0]).tanh()).tanh())
        return F.cross_entropy(logits, batch[1]) + 0.1 * torch.stack(decay).sum()


def marked_step(module: nn.Module, batch: Any, index: int) -> Tensor:
    return cast(Marked, module).training_step(batch, index)


def test_aliases_are_parameters_of_the_same_class_with_the_same_attributes() -> None:
    torch.manual_seed(0)
    module, batches = Marked().double(), freeze(contents())
    (content,) = contents(sizes=(16,))
    marked_step(module, content, 0)  # the training has tied them
    space = ParameterSpace.of(module)

    def loss(twin: nn.Module, batch: Any, index: int) -> Tensor:
        for own, other in zip(module.parameters(), twin.parameters(), strict=True):
            vars(other).update(vars(own))  # a deep copy forgets them
        return marked_step(twin, batch, index)

    expected = dense_hessian(module, loss, batches, space.names)
    torch.testing.assert_close(probe(module, marked_step, batches), expected, rtol=1e-9, atol=1e-11)


def test_layers_that_the_step_freezes_have_no_curvature() -> None:
    def loss(module: nn.Module, batch: Any, index: int) -> Tensor:
        cast(nn.Sequential, module)[0].requires_grad_(False)
        return cross_entropy(module, batch, index)

    module, batches = build("mlp"), freeze(contents())
    found = probe(module, loss, batches)
    expected = dense_hessian(module, cross_entropy, batches, ["2.weight", "2.bias"])
    last = len(expected)
    torch.testing.assert_close(found[-last:, -last:], expected, rtol=1e-9, atol=1e-12)
    assert not found[:-last].any() and not found[:, :-last].any()
    assert all(parameter.requires_grad for parameter in module.parameters())


def dense_with_clones(module: Stepper, batches: list[CurvatureBatch]) -> Tensor:
    """The dense reference, after the edits of the weights that a step begins with."""

    def loss(twin: nn.Module, batch: Any, index: int) -> Tensor:
        assert isinstance(twin, Stepper)
        twin.noise = torch.Generator().manual_seed(5)
        return twin.training_step(batch, index)

    return dense_hessian(module, loss, batches, ParameterSpace.of(module).names)


def test_training_steps_of_plain_modules() -> None:
    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(6, 1, bias=False)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.mse_loss(self.line(batch[0]).squeeze(1), batch[1].double())

    module, (content,) = Regression().double(), contents(sizes=(16,))
    found = probe(
        module,
        lambda module, batch, index: cast(Regression, module).training_step(batch, index),
        freeze([content]),
    )
    torch.testing.assert_close(found, 2 * content[0].T @ content[0] / 16)


def test_the_loss_is_told_the_batch_index() -> None:
    seen: list[int] = []

    def loss(module: nn.Module, batch: Any, index: int) -> Tensor:
        seen.append(index)
        return cross_entropy(module, batch, index)

    probe(build("mlp"), loss, [CurvatureBatch.freeze(contents()[0], 41, 0)])
    assert seen == [41]


def test_batches_edited_in_place_are_the_same_the_next_time() -> None:
    def greedy(module: nn.Module, batch: Any, index: int) -> Tensor:
        loss = cross_entropy(module, batch, index)
        batch[0].mul_(0)
        return loss

    module, pieces = build("mlp"), contents()
    batches = freeze(pieces)
    expected = dense_hessian(module, cross_entropy, batches, ParameterSpace.of(module).names)
    pieces[0][0].zero_()  # the loop's own batch is not ours either
    # A graph may hold the batch itself: what is written to there shows as an error, never as a wrong number.
    with pytest.raises(RuntimeError, match="inplace"):
        probe(module, greedy, batches)

    def careful(module: nn.Module, batch: Any, index: int) -> Tensor:
        batch[0].mul_(2)
        return cross_entropy(module, (batch[0] / 2, batch[1]), index)

    for retain in (True, False):
        torch.testing.assert_close(probe(module, careful, batches, retain), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["convolution", "dropout", "normalised"])
def test_the_module_and_its_surroundings_are_left_alone(name: str) -> None:
    module, batches = build(name), freeze(contents())
    fired: list[str] = []
    for key, parameter in module.named_parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
        parameter.register_hook(lambda gradient, key=key: fired.append(key))  # type: ignore[no-untyped-call]
        parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda parameter, key=key: fired.append(key)
        )
    grads = [parameter.grad for parameter in module.parameters()]
    before = copy.deepcopy(module.state_dict())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = (
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),
        torch.get_rng_state(),
    )

    probe(module, cross_entropy, batches)

    assert fired == []
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    for parameter, grad in zip(module.parameters(), grads, strict=True):
        assert parameter.grad is grad
        assert grad is not None and bool((grad == 3.0).all())
    assert random.getstate() == states[0]
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


BAD: dict[str, tuple[LossFunction, str]] = {
    "nan": (lambda m, b, i: cross_entropy(m, b, i) * float("nan"), "expected a finite loss, found nan"),
    "inf": (lambda m, b, i: cross_entropy(m, b, i) + float("inf"), "expected a finite loss, found inf"),
    "vector": (lambda m, b, i: cast(Tensor, m(b[0])).sum(1), r"expected a scalar loss.*\(8,\)"),
    "dictionary": (lambda m, b, i: cast(Tensor, {"loss": 1.0}), "expected a scalar loss.*dict"),
    "none": (lambda m, b, i: cast(Tensor, None), "expected a scalar loss.*NoneType"),
    "number": (lambda m, b, i: cast(Tensor, 1.0), "expected a scalar loss.*float"),
    "detached": (lambda m, b, i: cross_entropy(m, b, i).detach(), "depends on the probed parameters"),
    "without gradient": (torch.no_grad()(cross_entropy), "depends on the probed parameters"),
    # The loss is finite, its second derivative is not.
    "kink": (
        lambda m, b, i: (cast(Tensor, m(b[0])) * 0).abs().pow(1.5).sum(),
        "expected a finite Hessian-vector product",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_probed_says_so(name: str) -> None:
    loss, message = BAD[name]
    module = build("mlp")
    with pytest.raises(CurvatureError, match=message):
        probe(module, loss, freeze(contents()))


def test_every_way_to_a_product_refuses_numbers_that_are_not_finite() -> None:
    module = build("mlp")
    space = ParameterSpace.of(module)
    vector = torch.ones(space.size, dtype=torch.float64)
    operator = HessianOperator(module, BAD["kink"][0], freeze(contents()), space)
    with isolated(module), operator, pytest.raises(CurvatureError, match="finite"):
        list(operator.matvec_per_batch(vector))


def test_one_element_counts_as_a_scalar() -> None:
    module, batches = build("mlp"), freeze(contents())
    found = probe(module, lambda m, b, i: cross_entropy(m, b, i).reshape(1, 1), batches)
    torch.testing.assert_close(found, probe(module, cross_entropy, batches))


def test_no_batches_are_refused() -> None:
    module = build("mlp")
    with pytest.raises(ValueError, match="at least one curvature batch"):
        HessianOperator(module, cross_entropy, [], ParameterSpace.of(module))


def test_closing_frees_the_graphs() -> None:
    module = build("mlp")
    with isolated(module):
        operator = HessianOperator(module, cross_entropy, freeze(contents()), ParameterSpace.of(module))
        with operator:
            vector = torch.ones(operator.size, dtype=torch.float64)
            first = operator.matvec(vector)
            assert len(operator._graphs) == len(operator.batches)
        assert not operator._graphs
        assert torch.equal(operator.matvec(vector), first)


def test_noise_of_the_gradients() -> None:
    module, batches = build("mlp"), freeze(contents(sizes=(4, 4, 4)))
    space = ParameterSpace.of(module)
    with isolated(module), HessianOperator(module, cross_entropy, batches, space) as operator:
        gradients = torch.stack([gradient for _, gradient in operator.gradients()])
        assert gradient_noise_trace(operator) == pytest.approx(float(gradients.var(0).sum()))
    with isolated(module), HessianOperator(module, cross_entropy, batches[:1], space) as operator:
        assert np.isnan(gradient_noise_trace(operator))


@pytest.mark.parametrize("count", [3, 7, 12])
def test_equal_gradients_have_no_noise(count: int) -> None:
    """Not even that of rounding: a loop that repeats one batch has none."""
    module, (batch,) = build("mlp", torch.float32), freeze(contents(torch.float32, (64,)))
    space = ParameterSpace.of(module)
    with isolated(module), HessianOperator(module, cross_entropy, [batch] * count, space) as operator:
        assert gradient_noise_trace(operator) == 0


def test_cost_of_a_gradient() -> None:
    module, (batch,) = build("mlp", torch.float32), freeze(contents(torch.float32, (512,)))
    with isolated(module):
        cost = measure_gradient(module, cross_entropy, batch, ParameterSpace.of(module))
    activations = 512 * (6 + 7 + 3) * 4  # the least that has to be kept
    assert cost.seconds > 0
    assert activations <= cost.graph_bytes <= 10 * activations
    assert cost.graphs == 1
