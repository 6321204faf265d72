"""What a window remembers of its steps: running sums, and nothing else.

For every mode the pair (x, g) of each step, displacement before the step and gradient used by it, enters a
handful of sums, products with the few steps before included; displacements enter at dyadic lags. Memory does
not grow with the window.

Without replacement the noise of a step is anticorrelated with all earlier noise of its epoch. What enters the
sums are then innovations: each quantity with its best prediction from the epoch so far taken off, divided by
the standard deviation that is left, so that ordinary least squares on them is generalised least squares on
the steps (finite-population sampling: Cochran, Sampling Techniques, chapter 2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sgd_probe.dynamics.regression import AHEAD, COLUMNS, GRADIENT, ONE, TIME, Regression, X, least_squares

Array = NDArray[np.float64]

#: Products of a step with so many steps before it are kept.
LAGS = 4
#: Parts of the window whose sums are kept apart, to see noise that fades.
PARTS = 4
#: Where less than this share of a batch is left in the epoch after a step, its noise is known beforehand.
_SMALLEST_REST = 0.25
#: Of (1, t, x, g, u_1, u_2), what the force test compares.
_FORCE = [ONE, COLUMNS, COLUMNS + 1, GRADIENT]


class Draw(NamedTuple):
    """How the minibatch of a step was drawn.

    Attributes:
        batches: steps an epoch as a real number, ``N / (A B)``; infinity with replacement.
        share: samples of this step's minibatch over those of a full one (a partial last batch: below 1).
        first: this step is the first of its epoch.
        fresh: share of the noise that is drawn anew each time a sample is seen (augmentation, dropout).
    """

    batches: float = math.inf
    share: float = 1.0
    first: bool = False
    fresh: float = 0.0

    @property
    def memory(self) -> float:
        """``g`` of the noise's covariance ``diag(1 / share) - g 1 1^T`` within an epoch."""
        return (1 - self.fresh) / self.batches


@dataclass(frozen=True)
class WindowStatistics:
    """Sums over the used steps t = 0 .. steps - 1 of a window, one number per mode (shape (k,)).

    Where steps are drawn without replacement, x, g, t and the constant 1 below are their innovations.

    Attributes:
        steps: used steps.
        skipped: steps left out.
        informative: used steps whose noise was not known beforehand: all of them with replacement, all but an
            epoch's last without.
        planned: steps for which the window was opened.
        products: sums of products of (1, t, x, g) with each other, shape (4, 4, k).
        powers: sums of the first four powers of g itself, innovation or not (times the square root of the
            share of a partial batch, whose noise is larger), shape (4, k).
        lagged: sums of products of (1, t, x, g) of a step (second axis) with those j = 1 .. LAGS steps later
            (third axis), shape (LAGS, 4, 4, k).
        history: (1, t, x, g) of the last LAGS steps, newest first, shape (LAGS, 4, k).
        edges: products of (1, t, x, g) with themselves at the first step of each merged stretch and the last
            of all but the last one, shape (4, 4, k).
        parts: this sum and its first lag at the end of each part of the planned length, with the steps and
            the diffusion clock there.
        learning_rates: sum of nominal learning rates.
        confinement_clock: sum of effective learning rates (L).
        diffusion_clock: sum of their squares (S2).
        draw: how the last step was drawn.
        epochs: whole epochs seen from their first step.
        epoch: what the running epoch remembers.
        epoch_products: products of the sums of (1, x, g) over whole epochs, shape (3, 3, k).
        past_clock: variance of a flat mode's displacement over all epochs before this one, in units of the
            noise variance that an innovation has.
        force: products of (1, u_1, u_2, g) over the steps that had u = (Hv).(theta - theta_0), by two
            independent estimates of Hv, shape (4, 4, k).
        start: displacement before the first used step.
        position: displacement after the last used step.
        lag_position: displacement at the last multiple of 2^j steps, shape (levels, k).
        lag_clock: diffusion clock there, shape (levels,).
        lag_square: sum of squared non-overlapping displacements over 2^j steps, shape (levels, k).
        lag_net: sum of those displacements, shape (levels, k).
        lag_elapsed: diffusion clock that they span, shape (levels,).
        lag_spread: sum of the squares of what each spans, shape (levels,).
        lag_count: how many of them, shape (levels,).
    """

    steps: int
    skipped: int
    informative: int
    planned: int
    products: Array
    powers: Array
    lagged: Array
    history: Array
    edges: Array
    parts: tuple[Part, ...]
    learning_rates: float
    confinement_clock: float
    diffusion_clock: float
    draw: Draw
    epochs: int
    epoch: Epoch
    epoch_products: Array
    past_clock: float
    force: Array
    start: Array
    position: Array
    lag_position: Array
    lag_clock: Array
    lag_square: Array
    lag_net: Array
    lag_elapsed: Array
    lag_spread: Array
    lag_count: NDArray[np.int64]

    @property
    def modes(self) -> int:
        """Number of modes k."""
        return len(self.position)

    @property
    def equal_steps(self) -> float:
        """Steps of one size that would drive both clocks as far: L^2 / S2; 0 where nothing moved."""
        return self.confinement_clock**2 / self.diffusion_clock if self.diffusion_clock > 0 else 0.0

    @property
    def noise_units(self) -> float:
        """Variance of a full step's noise over that of an innovation: ``1 - g``; 1 with replacement."""
        return 1 - self.draw.memory

    @property
    def lag_equal(self) -> Array:
        """Displacements over equal spans of the clock that would be as precise, shape (levels,).

        Under a schedule fewer than there are: those while the learning rate is high decide.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            equal = self.lag_elapsed**2 / self.lag_spread
        return np.where(self.lag_spread > 0, equal, self.lag_count)

    @property
    def displacement_clock(self) -> float:
        """Variance of a flat mode's net displacement in units of an innovation's noise: S2 with replacement.

        Without momentum, under any schedule; momentum lags behind by a few of its memories.
        """
        return self.past_clock + self.epoch.displacement(self.draw)

    @classmethod
    def empty(cls, modes: int, planned_steps: int) -> WindowStatistics:
        """The statistics of no step yet; lags go up to a half of the planned length."""
        levels = max(int(math.log2(max(planned_steps, 2))), 1)
        zeros = np.zeros(modes)
        return cls(
            steps=0,
            skipped=0,
            informative=0,
            planned=planned_steps,
            products=np.zeros((COLUMNS, COLUMNS, modes)),
            powers=np.zeros((4, modes)),
            lagged=np.zeros((LAGS, COLUMNS, COLUMNS, modes)),
            history=np.zeros((LAGS, COLUMNS, modes)),
            edges=np.zeros((COLUMNS, COLUMNS, modes)),
            parts=(),
            learning_rates=0.0,
            confinement_clock=0.0,
            diffusion_clock=0.0,
            draw=Draw(),
            epochs=0,
            epoch=Epoch.of(modes, whole=False),
            epoch_products=np.zeros((3, 3, modes)),
            past_clock=0.0,
            force=np.zeros((4, 4, modes)),
            start=zeros,
            position=zeros,
            lag_position=np.zeros((levels, modes)),
            lag_clock=np.zeros(levels),
            lag_square=np.zeros((levels, modes)),
            lag_net=np.zeros((levels, modes)),
            lag_elapsed=np.zeros(levels),
            lag_spread=np.zeros(levels),
            lag_count=np.zeros(levels, dtype=np.int64),
        )

    def update(
        self,
        x: Array,
        g: Array,
        x_after: Array,
        learning_rate: float,
        effective_learning_rate: float,
        u: Array | None = None,
        draw: Draw = Draw(),  # noqa: B008  (immutable)
    ) -> WindowStatistics:
        """Take one step in.

        Args:
            x: displacement before the step, shape (k,).
            g: gradient used by the step, coupled weight decay included, shape (k,).
            x_after: displacement after it, shape (k,).
            learning_rate: nominal learning rate of the step.
            effective_learning_rate: with momentum and dampening.
            u: (Hv).(theta - theta_0) before the step where it is known, by one or two estimates of Hv, shape
                (k,) or (2, k).
            draw: how its minibatch was drawn.
        """
        now = np.empty((COLUMNS + 2, len(x)))
        now[ONE], now[TIME], now[X], now[GRADIENT] = 1.0, self.steps, x, g
        now[COLUMNS:] = 0.0 if u is None else u
        epoch, ended = self._epoch_for(draw)
        if math.isfinite(draw.batches):
            epoch, now = epoch.innovate(now, draw)
        epoch = epoch._replace(
            squared_rates=epoch.squared_rates + effective_learning_rate**2 / draw.share,
            rates=epoch.rates + effective_learning_rate,
        )
        informed = now[ONE, 0] > 0 if len(x) else True
        forces, now = now[_FORCE], now[:COLUMNS]
        products = now[:, None] * now
        powers = np.empty((4, len(x)))
        powers[0] = g if draw.share == 1 else g * math.sqrt(draw.share)
        np.multiply(powers[0], powers[0], out=powers[1])
        np.multiply(powers[1], powers[:2], out=powers[2:])
        steps, square = self.steps + 1, self.diffusion_clock + effective_learning_rate**2
        found = WindowStatistics(
            steps=steps,
            skipped=self.skipped,
            informative=self.informative + bool(informed),
            planned=self.planned,
            products=self.products + products,
            powers=self.powers + powers,
            lagged=self.lagged + self.history[:, :, None] * now,
            history=np.concatenate((now[None], self.history[:-1])),
            edges=self.edges if self.steps else self.edges + products,
            parts=self.parts,
            learning_rates=self.learning_rates + learning_rate,
            confinement_clock=self.confinement_clock + effective_learning_rate,
            diffusion_clock=square,
            draw=draw,
            epochs=ended.get("epochs", self.epochs),
            epoch=epoch,
            epoch_products=ended.get("epoch_products", self.epoch_products),
            past_clock=ended.get("past_clock", self.past_clock),
            force=self.force if u is None else self.force + forces[:, None] * forces,
            start=self.start if self.steps else x,
            position=x_after,
            **self._lags(steps, square, x, x_after),
        )
        due = len(self.parts) < PARTS and steps * PARTS >= self.planned * (len(self.parts) + 1)
        return dataclasses.replace(found, parts=(*self.parts, Part.of(found))) if due else found

    def _lags(self, steps: int, clock: float, x: Array, x_after: Array) -> dict[str, Any]:
        # Level j is due when 2^j divides the step count: as many levels as it has trailing zeros.
        due = min((steps & -steps).bit_length(), len(self.lag_count))
        position = self.lag_position.copy() if self.steps else np.repeat(x[None], len(self.lag_count), 0)
        times, square, net = self.lag_clock.copy(), self.lag_square.copy(), self.lag_net.copy()
        elapsed, spread = self.lag_elapsed.copy(), self.lag_spread.copy()
        count = self.lag_count.copy()
        moved = x_after - position[:due]
        net[:due] += moved
        square[:due] += moved * moved
        span = clock - times[:due]
        elapsed[:due] += span
        spread[:due] += span * span
        position[:due], times[:due] = x_after, clock
        count[:due] += 1
        return {
            "lag_position": position,
            "lag_clock": times,
            "lag_square": square,
            "lag_net": net,
            "lag_elapsed": elapsed,
            "lag_spread": spread,
            "lag_count": count,
        }

    def _epoch_for(self, draw: Draw) -> tuple[Epoch, dict[str, Any]]:
        """The epoch that a step belongs to, and the sums that change where it is a new one."""
        epoch = self.epoch
        # Beyond the last batch there is a new epoch, marked or not.
        over = math.isfinite(draw.batches) and epoch.drawn + draw.share > draw.batches + 0.5
        if not (draw.first or over):
            return epoch, {}
        changed: dict[str, Any] = {"past_clock": self.displacement_clock}
        if epoch.whole:
            sums = epoch.plain
            changed["epochs"] = self.epochs + 1
            changed["epoch_products"] = self.epoch_products + sums[:, None] * sums
        return Epoch.of(self.modes, whole=draw.first and math.isfinite(draw.batches)), changed

    def skip(self, draw: Draw = Draw()) -> WindowStatistics:  # noqa: B008  (immutable)
        """Count a step that is left out.

        Args:
            draw: how its minibatch was drawn; its noise is then neither known nor missed.
        """
        epoch, changed = self._epoch_for(draw)
        changed |= {"skipped": self.skipped + 1, "epoch": epoch._replace(whole=False)}
        return dataclasses.replace(self, **changed)

    def merge(self, later: WindowStatistics) -> WindowStatistics:
        """The statistics of two stretches, ``later`` observed after this one on the same modes.

        Displacements of both count from the same origin. Sums add up, so the order of stretches matters only
        for the trend and the ends; products and displacements across the seam are in neither.

        Raises:
            ValueError: they are of different modes or lags.
        """
        if self.lag_square.shape != later.lag_square.shape:
            raise ValueError(
                f"expected statistics of the same modes and lags, found {self.lag_square.shape} and "
                f"{later.lag_square.shape} (levels, modes)"
            )
        if not (self.steps and later.steps):
            kept, other = (later, self) if later.steps else (self, later)
            return dataclasses.replace(kept, skipped=kept.skipped + other.skipped)
        shift, there = float(self.steps), later
        move = _delay(shift)
        names = ("powers", "lag_square", "lag_net", "lag_elapsed", "lag_spread", "lag_count", "force")
        total: dict[str, Any] = {name: getattr(self, name) + getattr(there, name) for name in names}
        seam = self.history[0]
        # Every t of the later stretch is ``shift`` larger.
        return dataclasses.replace(
            later,
            **total
            | {
                "steps": self.steps + later.steps,
                "skipped": self.skipped + later.skipped,
                "informative": self.informative + later.informative,
                "planned": self.planned + later.planned,
                "products": self.products + np.einsum("ai,ijk,bj->abk", move, there.products, move),
                "lagged": self.lagged + np.einsum("ai,lijk,bj->labk", move, there.lagged, move),
                "history": np.einsum("ai,lik->lak", move, there.history),
                "edges": (
                    self.edges + seam[:, None] * seam + np.einsum("ai,ijk,bj->abk", move, there.edges, move)
                ),
                "parts": (),
                "learning_rates": self.learning_rates + later.learning_rates,
                "confinement_clock": self.confinement_clock + later.confinement_clock,
                "diffusion_clock": self.diffusion_clock + later.diffusion_clock,
                "lag_clock": there.lag_clock + self.diffusion_clock,
                "past_clock": self.displacement_clock + later.past_clock,
                "epochs": self.epochs + later.epochs,
                "epoch_products": self.epoch_products + later.epoch_products,
                "start": self.start,
            },
        )

    def state(self) -> dict[str, Any]:
        """Tensors and plain types from which :meth:`from_state` goes on to the same bits."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> WindowStatistics:
        """Read :meth:`state` back.

        Raises:
            ValueError: the state lacks a field or has one too many.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if names != set(state):
            wrong = ", ".join(sorted(names ^ set(state)))
            raise ValueError(
                f"expected the state of a window's statistics, found it to differ in {wrong}: it was written "
                "by another version; start a new window"
            )
        values: dict[str, Any] = {
            name: v.numpy().copy() if isinstance(v, Tensor) else v for name, v in state.items()
        }
        values["draw"] = Draw(*state["draw"])
        values["epoch"] = Epoch.from_state(state["epoch"])
        values["parts"] = tuple(Part.from_state(part) for part in state["parts"])
        return cls(**values)

    def ends(self) -> Array:
        """Products of (1, t, x, g) at the first and last step of each stretch, shape (4, 4, k)."""
        return np.asarray(self.edges + self.history[0][:, None] * self.history[0])

    def regress(self, trend: bool = False) -> Regression:
        """Least squares of g on (1, x), or on (1, x, t) with ``trend``, for every mode."""
        return least_squares(self.products, self.informative, AHEAD[trend])

    def kurtosis(self) -> Array:
        """Kurtosis of the used gradient along each mode: 3 for Gaussian noise."""
        n = float(self.steps)
        mean, square, cube, tesseract = self.powers / n
        second = square - mean**2
        fourth = tesseract - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(fourth / second**2)


class Epoch(NamedTuple):
    """What the running epoch remembers of its steps.

    Attributes:
        drawn: batches drawn so far, a real number.
        whole: its first step was seen, and none left out since.
        sums: of share times (1, t, x, g, u_1, u_2), shape (6, k).
        plain: of (1, x, g), shape (3, k).
        squared_rates: of ``eta_eff^2 / share``.
        rates: of ``eta_eff``.
    """

    drawn: float
    whole: bool
    sums: Array
    plain: Array
    squared_rates: float
    rates: float

    @classmethod
    def of(cls, modes: int, *, whole: bool) -> Epoch:
        """An epoch without a step yet."""
        return cls(0.0, whole, np.zeros((COLUMNS + 2, modes)), np.zeros((3, modes)), 0.0, 0.0)

    @classmethod
    def from_state(cls, state: Any) -> Epoch:
        """Read a plain tuple back."""
        drawn, whole, sums, plain, squared_rates, rates = state
        return cls(drawn, whole, sums.numpy().copy(), plain.numpy().copy(), squared_rates, rates)

    def displacement(self, draw: Draw) -> float:
        """Variance of a flat mode's displacement over the epoch so far, in units of an innovation's noise."""
        return self.squared_rates - draw.memory * self.rates**2

    def innovate(self, now: Array, draw: Draw) -> tuple[Epoch, Array]:
        """The epoch after a step, and what of the step could not be told from those before it."""
        after = self._replace(
            drawn=self.drawn + draw.share,
            sums=self.sums + draw.share * now,
            plain=self.plain + now[[ONE, X, GRADIENT]],
        )
        if not draw.memory > 0:
            return after, now * math.sqrt(draw.share)
        left = 1 / draw.memory - self.drawn
        rest = left - draw.share
        if rest < _SMALLEST_REST:
            return after, np.zeros_like(now)
        return after, (now + self.sums / left) * math.sqrt(draw.share * left / rest)


class Part(NamedTuple):
    """The running sums as they stood when a part of the window ended.

    Attributes:
        steps: used steps by then.
        diffusion_clock: by then.
        products: of (1, t, x, g) with each other, (4, 4, k).
        lagged: and with those of the step before, (4, 4, k).
    """

    steps: int
    diffusion_clock: float
    products: Array
    lagged: Array

    @classmethod
    def of(cls, statistics: WindowStatistics) -> Part:
        """The sums as they stand."""
        return cls(statistics.steps, statistics.diffusion_clock, statistics.products, statistics.lagged[0])

    @classmethod
    def from_state(cls, state: Any) -> Part:
        """Read a plain tuple back."""
        steps, clock, products, lagged = state
        return cls(steps, clock, products.numpy().copy(), lagged.numpy().copy())


def _delay(shift: float) -> Array:
    """The matrix that turns (1, t, x, g) into (1, t + shift, x, g)."""
    move = np.eye(COLUMNS)
    move[TIME, ONE] = shift
    return move


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value
