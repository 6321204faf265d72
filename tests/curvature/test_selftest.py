"""Which constructs the self-test accepts, refuses or cannot verify, on real modules."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from sgd_probe.curvature.finite_differences import FiniteDifferenceOperator
from sgd_probe.curvature.hessian import HessianOperator, LossFunction, WrongHessianError
from sgd_probe.curvature.linear_algebra import norm, random_unit
from sgd_probe.curvature.selftest import check_symmetry, self_test
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.isolation import isolated, seed_all
from tests.curvature import obstacles as ob
from tests.helpers.dense import freeze

Case: TypeAlias = tuple[Callable[[], nn.Module], LossFunction]

PASSED = re.compile(
    r"passed: symmetric to \S+; in float64 finite differences agree to (\S+), and the float32"
)

ACCEPTED: dict[str, Case] = {
    "relu": (lambda: ob.mlp(nn.ReLU()), ob.cross_entropy),
    "relu in place": (lambda: ob.mlp(nn.ReLU(inplace=True)), ob.cross_entropy),
    "edits in place": (ob.InPlace, ob.cross_entropy),
    "gelu": (lambda: ob.mlp(nn.GELU()), ob.cross_entropy),
    "dropout": (lambda: nn.Sequential(ob.mlp(nn.Tanh()), nn.Dropout(0.3)), ob.cross_entropy),
    "batch norm": (lambda: ob.made(ob.image(nn.BatchNorm2d(4), nn.ReLU())), ob.cross_entropy),
    "group norm": (lambda: ob.made(ob.image(nn.GroupNorm(2, 4), nn.GELU())), ob.cross_entropy),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)),
        ob.cross_entropy,
    ),
    "max pooling": (lambda: ob.made(ob.image(nn.MaxPool2d(2))), ob.cross_entropy),
    "lstm": (lambda: ob.Recurrent(nn.LSTM), ob.cross_entropy),
    "gru": (lambda: ob.Recurrent(nn.GRU), ob.cross_entropy),
    "tied weights": (ob.Tied, ob.cross_entropy),
    "checkpointing": (lambda: ob.Checkpointed(reentrant=False), ob.cross_entropy),
    "checkpointing first": (lambda: ob.Checkpointed(reentrant=False, early=True), ob.cross_entropy),
    "attention kernel": (lambda: ob.Tokens(ob.ScaledDotProduct()), ob.cross_entropy),
    "attention layer": (lambda: ob.Tokens(ob.Attention()), ob.cross_entropy),
    "transformer layer": (ob.transformer, ob.cross_entropy),
    "embedding": (lambda: ob.Tokens(nn.Tanh()), ob.cross_entropy),
    "sparse embedding": (lambda: ob.Tokens(nn.Tanh(), sparse=True), ob.cross_entropy),
    "embedding below its max_norm": (lambda: ob.Shortened(100.0), ob.cross_entropy),
    "embedding with a padding row": (lambda: ob.Tokens(nn.Tanh(), padding_idx=2), ob.cross_entropy),
    "output in float32": (lambda: ob.mlp(nn.Tanh()), ob.narrow_output),
    "constant": (lambda: ob.mlp(nn.Tanh()), ob.class_weights),
    "new constant": (lambda: ob.mlp(nn.Tanh()), ob.new_class_weights),
    "new noise": (lambda: ob.mlp(nn.Tanh()), ob.new_noise),
    "label smoothing": (lambda: ob.mlp(nn.Tanh()), ob.label_smoothing),
    "weight decay in the loss": (lambda: ob.mlp(nn.Tanh()), ob.weight_decay),
    "own function": (lambda: ob.applied(ob.TwiceDifferentiable), ob.cross_entropy),
    "weight norm by hand": (
        lambda: nn.Sequential(ob.HandWritten(6, 8), nn.Tanh(), ob.HandWritten(8, 3)),
        ob.cross_entropy,
    ),
    "old weight norm of all": (lambda: ob.weight_norm(nn.utils.weight_norm, dim=None), ob.cross_entropy),
    "new weight norm of all": (
        lambda: ob.weight_norm(parametrizations.weight_norm, dim=None),
        ob.cross_entropy,
    ),
    "teacher": (ob.Teacher, ob.distillation),
    "batch norm without weights": (
        lambda: ob.made(ob.image(nn.BatchNorm2d(4, affine=False), nn.ReLU(inplace=True))),
        ob.cross_entropy,
    ),
    "batch norm without statistics": (
        lambda: ob.made(ob.image(nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh())),
        ob.cross_entropy,
    ),
    "batch norm by all batches": (
        lambda: ob.made(ob.image(nn.BatchNorm2d(4, momentum=None), nn.Tanh())),
        ob.cross_entropy,
    ),
    "instance norm": (
        lambda: ob.made(ob.image(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))),
        ob.cross_entropy,
    ),
    "rms norm": (lambda: ob.mlp(nn.Sequential(nn.RMSNorm(8), nn.Tanh())), ob.cross_entropy),
    "prelu": (lambda: ob.mlp(nn.PReLU(8)), ob.cross_entropy),
    "rrelu": (lambda: ob.mlp(nn.RReLU()), ob.cross_entropy),
    "mish": (lambda: ob.mlp(nn.Mish()), ob.cross_entropy),
    "hardswish": (lambda: ob.mlp(nn.Hardswish()), ob.cross_entropy),
    "glu": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GLU(), nn.Linear(4, 3)), ob.cross_entropy),
    "low rank": (ob.LowRank, ob.cross_entropy),
    "scripted": (lambda: nn.Sequential(torch.jit.script(ob.mlp(nn.GELU()))), ob.cross_entropy),
    "learning to learn": (lambda: ob.mlp(nn.SiLU()), ob.learning_to_learn),
    "a copy of the teacher": (ob.copied, ob.distance_from_itself),
    "gradient penalty": (lambda: ob.Penalised(nn.GELU()), ob.gradient_penalty),
    "gradient penalty through group norm": (lambda: ob.Penalised(nn.GroupNorm(2, 8)), ob.gradient_penalty),
}

WRONG = "has a wrong second derivative"
FIXED = r"weights do not follow the slope of the loss.*Give a loss_fn whose target"
REFUSED: dict[str, tuple[Callable[[], nn.Module], LossFunction, str]] = {
    "once_differentiable": (lambda: ob.applied(ob.OnceDifferentiable), ob.cross_entropy, WRONG),
    "numpy": (lambda: ob.applied(ob.InNumpy), ob.cross_entropy, WRONG),
    "detach": (
        lambda: ob.applied(ob.Detached),
        ob.cross_entropy,
        r"differences.*in first\.\w+ \(float64\).*detaches",
    ),
    # These make the whole Hessian zero, which is as symmetric as can be.
    "once_differentiable alone": (lambda: ob.alone(ob.OnceDifferentiable), ob.cross_entropy, WRONG),
    "numpy alone": (lambda: ob.alone(ob.InNumpy), ob.cross_entropy, WRONG),
    "old weight norm": (
        lambda: ob.weight_norm(nn.utils.weight_norm),
        ob.cross_entropy,
        "weight_norm.*dim=None",
    ),
    "new weight norm": (
        lambda: ob.weight_norm(parametrizations.weight_norm),
        ob.cross_entropy,
        r"weight_norm.*g \* v / v\.norm",
    ),
    "spectral norm": (
        lambda: ob.weight_norm(parametrizations.spectral_norm),
        ob.cross_entropy,
        "spectral_norm in training mode",
    ),
    # The derivative of torch's own second derivative takes mean and deviation for constants.
    "gradient penalty through layer norm": (
        lambda: ob.Penalised(nn.LayerNorm(8)),
        ob.gradient_penalty,
        "penalty through batch, layer or instance",
    ),
    "gradient penalty through batch norm": (
        lambda: ob.Penalised(nn.BatchNorm1d(8)),
        ob.gradient_penalty,
        "penalty through batch, layer or instance",
    ),
    "gradient penalty through instance norm": (
        lambda: ob.Penalised(nn.Sequential(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2), nn.Flatten())),
        ob.gradient_penalty,
        "penalty through batch, layer or instance",
    ),
    "bags of embeddings": (ob.Bag, ob.cross_entropy, "cannot.*_embedding_bag_backward"),
    "distances": (lambda: ob.mlp(nn.Tanh()), ob.distances, "cannot.*_cdist_backward"),
    "ctc": (lambda: nn.Linear(6, 4), ob.ctc, "cannot.*_ctc_loss_backward"),
    "hardsigmoid": (lambda: ob.mlp(nn.Hardsigmoid()), ob.cross_entropy, "cannot.*hardsigmoid_backward"),
    "padding by a function": (ob.Padded, ob.cross_entropy, f"{FIXED}|{WRONG}"),
    "first order": (lambda: ob.mlp(nn.SiLU()), partial(ob.learning_to_learn, order=1), f"{FIXED}|{WRONG}"),
    "a fixed point by its last step": (ob.FixedPoint, ob.cross_entropy, FIXED),
    "fake quantisation": (
        lambda: ob.mlp(FakeQuantize(quant_min=0, quant_max=255)),  # type: ignore[no-untyped-call]
        ob.cross_entropy,
        FIXED,
    ),
    "frozen in the step": (ob.SoftTarget, ob.frozen_in_the_step, "the training step freezes itself"),
    "a set of parameters": (ob.Sorted, ob.sorted_decay, "same loss on the weights and on aliases"),
    "straight through": (lambda: ob.applied(ob.StraightThrough), ob.cross_entropy, FIXED),
    "embedding above its max_norm": (lambda: ob.Shortened(0.5), ob.cross_entropy, FIXED),
    "detached target": (ob.SoftTarget, ob.self_distillation, FIXED),
    "reentrant checkpointing": (
        lambda: ob.Checkpointed(reentrant=True),
        ob.cross_entropy,
        r"cannot.*use_reentrant=True.*use_reentrant=False",
    ),
    # Autograd leaves the part's gradient out without a word.
    "reentrant checkpointing first": (
        lambda: ob.Checkpointed(reentrant=True, early=True),
        ob.cross_entropy,
        r"slope of the loss.*use_reentrant=True \(use False\)",
    ),
}

UNVERIFIED: dict[str, tuple[Callable[[], nn.Module], LossFunction, str]] = {
    "kernel": (
        lambda: ob.applied(ob.InFloat32),
        ob.cross_entropy,
        "NotImplementedError: the kernel takes float32",
    ),
    "narrowed": (
        lambda: ob.mlp(nn.Tanh()),
        ob.narrowed_output,
        "a part of the loss is computed in torch.float32",
    ),
    "steps on the way": (
        lambda: ob.weight_norm(parametrizations.orthogonal),
        ob.cross_entropy,
        "unreliable: expected finite differences",
    ),
}


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().train()


def ask(module: nn.Module, loss: LossFunction, seed: int = 0) -> str:
    batches = freeze([ob.content(), ob.content(8)])
    with isolated(module), HessianOperator(module, loss, batches, ParameterSpace.of(module)) as operator:
        return self_test(operator, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepts(name: str) -> None:
    make, loss = ACCEPTED[name]
    module = build(make)
    for seed in range(3):
        line = ask(module, loss, seed)
        found = PASSED.match(line)
        assert found, line
        assert float(found[1]) < 1e-5
        assert float(line.rpartition(" ")[2]) < 1e-5


def test_accepts_networks_with_many_kinks() -> None:
    module = build(ob.deep)
    for seed in range(4):
        assert PASSED.match(ask(module, ob.cross_entropy, seed))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_accepts_compiled_modules(backend: str) -> None:
    module = cast(nn.Module, torch.compile(build(ob.transformer), backend=backend))
    ob.cross_entropy(module, ob.content(), 0).backward()  # type: ignore[no-untyped-call]
    assert PASSED.match(ask(module, ob.cross_entropy))


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    make, loss, message = REFUSED[name]
    module = build(make)
    for seed in range(3):
        with pytest.raises(WrongHessianError, match=message) as caught:
            ask(module, loss, seed)
        assert "loss_fn" in str(caught.value)  # a way out


@pytest.mark.parametrize("name", UNVERIFIED)
def test_says_what_it_could_not_verify(name: str) -> None:
    make, loss, reason = UNVERIFIED[name]
    line = ask(build(make), loss)
    assert line.startswith("unverified: symmetric to")
    assert reason in line
    assert "passed" not in line
    assert "\n" not in line


def test_weight_norm_is_wrong_in_both_precisions() -> None:
    for wrap in (nn.utils.weight_norm, parametrizations.weight_norm):
        for dtype in (torch.float32, torch.float64):
            module = build(lambda: ob.weight_norm(wrap)).to(dtype)  # noqa: B023
            batches = freeze([(ob.content()[0].to(dtype), ob.content()[1])])
            space = ParameterSpace.of(module)
            with isolated(module), HessianOperator(module, ob.cross_entropy, batches, space) as operator:
                matrix = torch.stack([operator.matvec(row) for row in torch.eye(space.size, dtype=dtype)])
            assert norm((matrix - matrix.T).flatten()) > 0.05 * norm(matrix.flatten())


def test_a_teacher_that_creeps_within_the_step_is_let_pass_with_its_error() -> None:
    line = ask(build(ob.MovingTeacher), ob.distillation)
    found = PASSED.match(line)
    assert found
    assert 1e-4 < float(found[1]) < 1e-2


def test_a_constant_that_is_a_buffer_is_cast_along() -> None:
    module = build(lambda: ob.mlp(nn.Tanh()))
    module.register_buffer("classes", torch.tensor([1.0, 2.0, 3.0]))

    def weighted(module: nn.Module, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], weight=module.get_buffer("classes"))

    assert PASSED.match(ask(module, weighted))


def test_says_where_the_precision_changes_the_random_numbers() -> None:
    line = ask(build(lambda: ob.mlp(nn.Tanh())), ob.noise)
    assert PASSED.match(line)
    assert "other random numbers" in line


def test_a_model_in_float64_is_compared_as_it_is() -> None:
    module = build(lambda: ob.mlp(nn.Tanh())).double()
    x, y = ob.content()
    with (
        isolated(module),
        HessianOperator(
            module, ob.cross_entropy, freeze([(x.double(), y)]), ParameterSpace.of(module)
        ) as operator,
    ):
        line = self_test(operator, torch.Generator().manual_seed(0))
    assert line.startswith("passed: symmetric to")
    assert "float32" not in line


def test_a_linear_loss_passes() -> None:
    line = ask(nn.Linear(6, 3), lambda module, batch, index: module(batch[0]).mean())
    assert line.startswith("passed: the Hessian vanishes on random vectors")


def test_a_loss_that_is_nearly_linear_passes() -> None:
    """Of its curvature a difference of gradients has little but rounding."""
    for seed in range(3):
        assert ask(build(ob.SoftTarget), ob.nearly_linear, seed).startswith("passed: symmetric to")


def test_weights_that_are_all_zero_pass() -> None:
    module = build(lambda: ob.mlp(nn.Tanh()))
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    assert ask(module, ob.cross_entropy).startswith("passed")


@pytest.mark.parametrize("name", ["batch norm", "dropout", "transformer layer"])
def test_leaves_no_trace(name: str) -> None:
    module = build(ACCEPTED[name][0])
    before = copy.deepcopy(module.state_dict())
    seed_all(5)
    state = torch.get_rng_state()

    ask(module, ob.cross_entropy)

    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in module.parameters())
    for key, value in module.state_dict().items():
        assert value.dtype is before[key].dtype
        assert torch.equal(value, before[key]), key


def test_costs_a_handful_of_evaluations() -> None:
    calls: list[torch.dtype] = []

    def counted(module: nn.Module, batch: Any, index: int) -> Tensor:
        calls.append(batch[0].dtype)
        return ob.cross_entropy(module, batch, index)

    ask(build(lambda: ob.mlp(nn.Tanh())), counted)
    assert calls.count(torch.float32) == 2 + 2  # the operator's own graphs; a loss on aliases and weights
    assert calls.count(torch.float64) == 1 + 4 + 2


def test_a_loss_that_no_two_evaluations_agree_on_is_no_sign_of_other_weights() -> None:
    def unseeded(module: nn.Module, batch: Any, index: int) -> Tensor:
        return ob.cross_entropy(module, batch, index) * np.random.default_rng().uniform(0.5, 1.5)

    assert ask(build(lambda: ob.mlp(nn.Tanh())), unseeded).startswith("unverified: symmetric to")


def test_symmetry_alone_misses_a_detached_part() -> None:
    module = build(lambda: ob.applied(ob.Detached))
    batches, generator = freeze([ob.content()]), torch.Generator().manual_seed(0)
    with isolated(module):
        operator = HessianOperator(module, ob.cross_entropy, batches, ParameterSpace.of(module))
        assert check_symmetry(operator, generator).startswith("symmetric to")
        vector = random_unit(operator.size, torch.empty(0), generator)
        assert norm(operator.matvec(vector)) > 0


def test_of_finite_differences_double_backward_is_no_judge() -> None:
    for make in (lambda: ob.applied(ob.OnceDifferentiable), lambda: ob.mlp(nn.Tanh())):
        module = build(make).double()
        x, y = ob.content()
        batches, space = freeze([(x.double(), y)]), ParameterSpace.of(module)
        with isolated(module):
            operator = FiniteDifferenceOperator(module, ob.cross_entropy, batches, space)
            line = self_test(operator, torch.Generator().manual_seed(0))
        assert line.startswith("passed: finite differences, symmetric to")
        assert line.endswith("the gradient is the slope of the loss")


def test_finite_differences_serve_what_has_no_second_derivative() -> None:
    cases: tuple[Case, ...] = (
        (ob.Bag, ob.cross_entropy),
        (lambda: ob.mlp(nn.Tanh()), ob.distances),
        (lambda: nn.Linear(6, 4), ob.ctc),
        (lambda: ob.mlp(nn.Hardsigmoid()), ob.cross_entropy),
        (lambda: ob.Penalised(nn.LayerNorm(8)), ob.gradient_penalty),
    )
    for make, loss in cases:
        module = build(make).double()
        x, y = ob.content()
        batches, space = freeze([(x.double(), y)]), ParameterSpace.of(module)
        with isolated(module):
            operator = FiniteDifferenceOperator(module, loss, batches, space)
            assert self_test(operator, torch.Generator().manual_seed(0)).startswith("passed: finite")


def test_of_finite_differences_the_gradient_must_be_a_slope() -> None:
    module = build(lambda: ob.applied(ob.StraightThrough))
    with isolated(module):
        operator = FiniteDifferenceOperator(
            module, ob.cross_entropy, freeze([ob.content()]), ParameterSpace.of(module)
        )
        with pytest.raises(WrongHessianError, match="do not follow the slope of the loss"):
            self_test(operator, torch.Generator().manual_seed(0))


def test_weights_in_half_precision_have_the_hessian_of_the_loss_in_float32() -> None:
    for name in ("transformer layer", "batch norm"):
        make, loss = ACCEPTED[name]
        module = build(make).to(torch.bfloat16)
        twin = copy.deepcopy(module).float()
        inputs, labels = ob.content()
        coarse = freeze([(inputs.to(torch.bfloat16), labels)])
        fine = freeze([(inputs.to(torch.bfloat16).float(), labels)])
        space = ParameterSpace.of(module)
        with (
            isolated(module),
            HessianOperator(module, loss, coarse, space, dtype=torch.float32) as operator,
            isolated(twin),
            HessianOperator(twin, loss, fine, ParameterSpace.of(twin)) as expected,
        ):
            vector = random_unit(space.size, torch.empty(0), torch.Generator().manual_seed(1))
            product = expected.matvec(vector)
            assert norm(operator.matvec(vector) - product) < 1e-5 * norm(product)
            assert PASSED.match(self_test(operator, torch.Generator().manual_seed(1)))
        assert module.state_dict().keys() == twin.state_dict().keys()
        assert all(p.dtype is torch.bfloat16 and p.grad is None for p in module.parameters())
