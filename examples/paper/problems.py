"""Two networks at true minima of their losses: digits by an MLP, and the next character by a transformer.

Both are small enough that the Hessian of the whole loss is dense: all modes are known, and the gradient of
every sample. The loss is that of a finite population, which SGD samples from. Its L2 term is part of it, so
that the mean gradient vanishes at the minimum.

    problem = load("language")
    problem.gradient(theta, indices)   # of a minibatch; vmap-able over both
    problem.eigenvalues, problem.vectors

The minima are kept beside this file, because the search takes a minute; ``load(name, anew=True)`` searches
again. Either way the gradient and the curvature are computed from the data, and checked.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

Name = Literal["vision", "language"]
NAMES: tuple[Name, ...] = ("vision", "language")
HERE = Path(__file__).resolve().parent
MINIMA, SONNETS = HERE / "minima", HERE / "sonnets.txt"

#: Norm of the gradient at what counts as a minimum.
GRADIENT = 1e-10
#: Eigenvalues below this share of the largest are zero: directions that change nothing at all.
ZERO = 1e-8
#: Modes with less than this share of the mean noise have none: they cannot move.
NOISELESS = 1e-9
#: Characters of a sample.
LENGTH = 8


@dataclass(frozen=True, eq=False)
class Problem:
    """A network at a minimum of its loss, and all that the theory needs to know of it. Float64.

    Attributes:
        name: "vision" or "language".
        model: gives the architecture; its own weights are not used. See :meth:`module`.
        decay: factor of the L2 term ``decay / 2 |theta|^2``, which is part of every minibatch's loss.
        weights: theta_0, the minimum, in the order of ``model.parameters()``, (p,).
        inputs: the population: all samples, (N, ...).
        targets: classes, (N,), or (N, characters) of a text.
        hessian: of the loss of the population at theta_0, (p, p).
    """

    name: Name
    model: nn.Module
    decay: float
    weights: Tensor
    inputs: Tensor
    targets: Tensor
    hessian: Tensor

    @property
    def samples(self) -> int:
        """N."""
        return len(self.inputs)

    @property
    def size(self) -> int:
        """Number of weights p."""
        return len(self.weights)

    def loss_of(self, weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of some samples plus the L2 term, at flat weights; vmap-able."""
        return regularized(self.model, self.decay, weights, inputs, targets)

    def loss(self, weights: Tensor, indices: Tensor | None = None) -> Tensor:
        """Of the samples with these indices, (B,), or of the whole population; in the weights' dtype.

        It can be differentiated and mapped: ``vmap(grad(problem.loss))(stacked_weights, stacked_indices)``.
        """
        inputs, targets = self.inputs.to(weights.dtype), self.targets
        if indices is not None:
            inputs, targets = inputs[indices], targets[indices]
        return self.loss_of(weights, inputs, targets)

    def gradient(self, weights: Tensor, indices: Tensor | None = None) -> Tensor:
        """Of :meth:`loss`, (p,); vmap-able."""
        found: Tensor = grad(self.loss)(weights, indices)
        return found

    def product(self, vector: Tensor, weights: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
        """Hessian of :meth:`loss` times a vector, at theta_0 or elsewhere, (p,); vmap-able."""
        there = self.weights.to(vector.dtype) if weights is None else weights
        found: Tensor = jvp(lambda at: self.gradient(at, indices), (there,), (vector,))[1]
        return found

    def module(self, weights: Tensor | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
        """An ordinary module with these weights (those of the minimum) for an ordinary optimizer.

        Its loss is ``problem.criterion(module(inputs), targets)``, plus the L2 term, which is
        ``weight_decay=problem.decay`` of ``torch.optim.SGD``.
        """
        module = copy.deepcopy(self.model).to(dtype)
        flat = (self.weights if weights is None else weights).to(dtype)
        nn.utils.vector_to_parameters(flat.clone(), module.parameters())
        return module

    @staticmethod
    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over samples and, in a text, over characters."""
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    @cached_property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Indices of two disjoint random halves: modes found on one are measured on the other."""
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(0))
        return order[: self.samples // 2], order[self.samples // 2 :]

    def on(self, indices: Tensor) -> Problem:
        """The same network on some of the samples. theta_0 is no minimum of theirs."""
        chosen = replace(self, inputs=self.inputs[indices], targets=self.targets[indices])
        return replace(chosen, hessian=dense_hessian(chosen.loss, self.weights))

    def without(self, part: Problem, indices: Tensor) -> Problem:
        """The complement of ``part``, which is on these samples: what is left of the sum of all Hessians."""
        left = torch.ones(self.samples, dtype=torch.bool)
        left[indices] = False
        hessian = (self.samples * self.hessian - part.samples * part.hessian) / int(left.sum())
        return replace(self, inputs=self.inputs[left], targets=self.targets[left], hessian=hessian)

    @cached_property
    def _modes(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.hessian)
        return values.flip(0), vectors.flip(1)

    @property
    def eigenvalues(self) -> Tensor:
        """Of the Hessian, descending, (p,)."""
        return self._modes[0]

    @property
    def vectors(self) -> Tensor:
        """Its eigenvectors as columns, (p, p)."""
        return self._modes[1]

    @cached_property
    def gradients(self) -> Tensor:
        """Of each sample at theta_0, L2 term included, (N, p)."""
        each = vmap(self.gradient, in_dims=(None, 0), chunk_size=128)
        found: Tensor = each(self.weights, torch.arange(self.samples)[:, None])
        return found

    @cached_property
    def deviations(self) -> Tensor:
        """Of each sample's gradient from the mean, along each mode, (N, p)."""
        rows = self.gradients @ self.vectors
        return rows - rows.mean(0)

    @cached_property
    def sample_variance(self) -> Tensor:
        """S^2 of each mode: variance of v.g_i over the population, (p,). A minibatch has S^2 / B."""
        return self.deviations.square().mean(0)

    @cached_property
    def moving(self) -> Tensor:
        """Modes that have noise, as a mask, (p,).

        The others cannot move: weights of pixels that are always dark, what shifts all outputs together, and
        in the transformer what changes nothing: a rotation of the residual stream and of all that reads and
        writes it, of queries and keys, or of values and what reads them.
        """
        return self.sample_variance >= NOISELESS * self.sample_variance.mean()

    def rate(self, pull: float) -> float:
        """The learning rate with this eta lambda_1."""
        return pull / float(self.eigenvalues[0])


@lru_cache(maxsize=4)
def load(name: Name, anew: bool = False) -> Problem:
    """A problem at its minimum.

    Args:
        name: "vision" or "language".
        anew: search for the minimum (a minute) instead of taking the weights kept in ``minima/``.

    Raises:
        ValueError: another name.
        RuntimeError: the weights are not at a minimum.
    """
    if name not in NAMES:
        raise ValueError(f"expected one of {', '.join(NAMES)}, found {name!r}")
    model, inputs, targets, decay = _vision() if name == "vision" else _language()

    def loss(weights: Tensor) -> Tensor:
        return regularized(model, decay, weights, inputs, targets)

    if anew:
        weights = _descend(loss, nn.utils.parameters_to_vector(model.parameters()).detach())
    else:
        weights = torch.from_numpy(np.load(MINIMA / f"{name}.npy", allow_pickle=False))
    weights, hessian = _polish(loss, weights)
    return Problem(name, model, decay, weights, inputs, targets, hessian)


def regularized(model: nn.Module, decay: float, weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy plus the L2 term whose gradient is ``decay`` times the weights: coupled weight decay."""
    shapes = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    pieces = torch.split(weights, [shape.numel() for _, shape in shapes])
    named = {name: piece.view(shape) for (name, shape), piece in zip(shapes, pieces, strict=True)}
    outputs = functional_call(model, named, (inputs,))
    return Problem.criterion(outputs, targets) + decay / 2 * weights @ weights


def dense_hessian(loss: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
    """All second derivatives, symmetric, (p, p)."""

    def product(vector: Tensor) -> Tensor:
        found: Tensor = jvp(grad(loss), (weights,), (vector,))[1]
        return found

    found: Tensor = vmap(product, chunk_size=16)(torch.eye(len(weights), dtype=weights.dtype))
    return (found + found.T) / 2


def _vision() -> tuple[nn.Module, Tensor, Tensor, float]:
    """64-12-10, tanh, on scikit-learn's 1,797 digits: 910 weights."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float64) / 16
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    return model, inputs - inputs.mean(0), torch.tensor(digits.target), 3e-3


def _language() -> tuple[nn.Module, Tensor, Tensor, float]:
    """A transformer of one block, 838 weights, on 523 disjoint pieces of eight characters of sonnets.

    The text is seven sonnets of Shakespeare in 26 characters. They come as one-hot vectors: the product with
    the embedding costs no more, and needs no index under vmap.
    """
    words = "".join(c if c.isalpha() else " " for c in SONNETS.read_text(encoding="utf-8").lower()).split()
    text = " ".join(words)
    letters = sorted(set(text))
    stream = torch.tensor([letters.index(c) for c in text])
    pieces = torch.stack([stream[i : i + LENGTH + 1] for i in range(0, len(stream) - LENGTH, LENGTH)])
    torch.manual_seed(0)
    model = Transformer(len(letters)).double()
    return model, F.one_hot(pieces[:, :-1], len(letters)).double(), pieces[:, 1:].contiguous(), 1e-3


class Transformer(nn.Module):
    """One block of causal attention and a hidden layer, both with shortcuts; every next character.

    Without LayerNorm: under weight decay the weights before it shrink until its small constant counts, and
    there the curvature is thousands of times as large as anywhere else.

    Args:
        letters: size of the alphabet.
        width: of the residual stream.
        inner: of queries, keys and values.
        hidden: of the hidden layer.
    """

    future: Tensor

    def __init__(self, letters: int, width: int = 8, inner: int = 4, hidden: int = 12) -> None:
        super().__init__()
        self.letters = nn.Parameter(0.5 * torch.randn(letters, width))
        self.places = nn.Parameter(0.5 * torch.randn(LENGTH, width))
        self.mix = nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.hidden = nn.Linear(width, hidden)
        self.back = nn.Linear(hidden, width, bias=False)
        self.head = nn.Linear(width, letters)
        self.register_buffer("future", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., characters, letters) of one-hot characters of the same shape."""
        x = x @ self.letters + self.places
        queries, keys, values = self.mix(x).chunk(3, -1)
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(keys.shape[-1])
        x = x + self.out(scores.masked_fill(self.future, -math.inf).softmax(-1) @ values)
        x = x + self.back(torch.tanh(self.hidden(x)))
        logits: Tensor = self.head(x)
        return logits


def _descend(loss: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
    """Full-batch L-BFGS."""
    found = weights.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [found],
        max_iter=5_000,
        max_eval=10_000,
        tolerance_grad=1e-6,
        tolerance_change=0.0,
        history_size=60,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(found)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return found.detach()


def _polish(loss: Callable[[Tensor], Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's steps to the last digits, with the Hessian there.

    Raises:
        RuntimeError: it is no minimum.
    """
    gradient = grad(loss)
    for _ in range(4):
        hessian = dense_hessian(loss, weights)
        values, vectors = torch.linalg.eigh(hessian)
        if not values[0] > -ZERO * values[-1]:
            raise RuntimeError(f"expected a minimum, found a saddle with the eigenvalue {values[0]:.3g}")
        alive = values > ZERO * values[-1]
        started = weights
        for _ in range(20):
            slope = gradient(weights)
            if float(slope.norm()) < GRADIENT:
                break
            weights = weights - vectors[:, alive] @ ((slope @ vectors[:, alive]) / values[alive])
        if float(gradient(weights).norm()) < GRADIENT and float((weights - started).norm()) < 1e-6:
            return weights, hessian
    raise RuntimeError(
        f"expected a gradient below {GRADIENT:g} at a minimum, found {float(gradient(weights).norm()):.3g}"
    )


if __name__ == "__main__":
    MINIMA.mkdir(exist_ok=True)
    for each in NAMES:
        np.save(MINIMA / f"{each}.npy", load(each, anew=True).weights.numpy())
