r"""SGD in one dimension as a fluctuating loss: its exact master equation, and what approximates it.

A minibatch moves a weight by ``theta' = theta - eta dL_B(theta)``. The density of many runs obeys the master
equation (arXiv:2605.22644)

    P'(theta) = E_B integral delta(theta - phi + eta dL_B(phi)) P(phi) dphi,

which to second order in eta is the discrete Fokker-Planck equation

    P' - P = eta d(dL P) + (eta^2 / 2) d^2(M P),    M = E_B[dL_B^2] = C + dL^2.

It gives the change of E[theta] and E[theta^2] over a step exactly, for any loss and any state-dependent
noise; higher moments it does not fix. The Langevin equation ``dtheta = -dL dt + sqrt(eta C) dW`` (Ito) has
C in place of M.

Every equation here becomes a matrix on a uniform grid whose columns sum to one: ``p' = matrix @ p`` with p
the probability of each cell, shape (cells,). Nothing leaves the grid: choose it wide enough (``edge``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import expm
from scipy.sparse import csr_array

Array = NDArray[np.float64]
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Grid:
    """Cells of one width.

    Attributes:
        low: centre of the first cell.
        high: centre of the last.
        cells: how many, at least 3.
    """

    low: float
    high: float
    cells: int

    def __post_init__(self) -> None:
        if not (self.low < self.high and self.cells >= 3):
            raise ValueError(f"expected low < high and at least 3 cells, found {self}")

    @property
    def width(self) -> float:
        """Of a cell."""
        return (self.high - self.low) / (self.cells - 1)

    @cached_property
    def centres(self) -> Array:
        """Shape (cells,)."""
        return np.linspace(self.low, self.high, self.cells)

    def gaussian(self, mean: float, deviation: float) -> Array:
        """Cell probabilities; moments are right to rounding from a deviation of two cells on."""
        density = np.exp(-0.5 * ((self.centres - mean) / deviation) ** 2)
        return np.asarray(density / density.sum())

    def moment(self, probability: Array, order: int = 1) -> float:
        """``E[theta^order]``."""
        return float(self.centres**order @ probability)

    def variance(self, probability: Array) -> float:
        """Of theta, squared weight units."""
        return float((self.centres - self.moment(probability)) ** 2 @ probability)

    def edge(self, probability: Array) -> float:
        """Probability in the two outermost cells: should be negligible."""
        return float(probability[0] + probability[-1])


@dataclass(frozen=True, eq=False)
class FluctuatingLoss:
    """A finite set of minibatch losses, drawn with equal chances, by their gradients on a grid.

    Attributes:
        grid: where.
        gradients: ``dL_B`` at the centres, (batches, cells).

    Raises:
        ValueError: the shape does not fit the grid.
    """

    grid: Grid
    gradients: Array

    def __post_init__(self) -> None:
        if self.gradients.ndim != 2 or self.gradients.shape[1] != self.grid.cells:
            raise ValueError(
                f"expected gradients (batches, {self.grid.cells}), found {self.gradients.shape}: "
                "one row a batch, evaluated at grid.centres"
            )

    @cached_property
    def mean_gradient(self) -> Array:
        """``dL``, (cells,)."""
        return np.asarray(self.gradients.mean(0))

    @cached_property
    def noise_variance(self) -> Array:
        """``C``, (cells,)."""
        return np.asarray(self.gradients.var(0))

    @property
    def second_moment(self) -> Array:
        """``M = C + dL^2``, (cells,)."""
        return self.noise_variance + self.mean_gradient**2


def master_equation(loss: FluctuatingLoss, learning_rate: float) -> csr_array:
    """The exact push-forward of every cell's centre by every minibatch, shared between the two nearest cells.

    Probabilities stay positive and the mean is exact. The sharing adds ``d (1 - d) w^2`` to the second moment
    of each landing point d cells past a centre, w a cell's width: at most ``w^2 / 4``, a sixth on average,
    a step.
    """
    grid = loss.grid
    landing = (grid.centres - learning_rate * loss.gradients - grid.low) / grid.width
    landing = landing.clip(0, grid.cells - 1)
    left = np.minimum(landing.astype(np.intp), grid.cells - 2)
    share = landing - left
    source = np.broadcast_to(np.arange(grid.cells), landing.shape)
    return _transition(grid, (left, left + 1), source, (1 - share, share), len(landing))


def discrete_fokker_planck(loss: FluctuatingLoss, learning_rate: float) -> csr_array:
    """A step of the discrete Fokker-Planck equation as it is written, by central differences in flux form.

    Probability, mean and second moment change exactly as they should, on any grid, away from its edges. The
    equation is a truncated expansion: on cells narrower than a kick, ``eta^2 M > w^2`` with w a cell's width,
    it holds for one step from a smooth density and amplifies what is rough when iterated. Coarser cells
    can be iterated, down to the exact stationary variance of a quadratic. On fine cells iterate
    :func:`euler_maruyama`, a positive kernel with the same two moments.
    """
    grid = loss.grid
    cells = np.arange(grid.cells)
    drift = learning_rate * loss.mean_gradient / grid.width
    spread = learning_rate**2 * loss.second_moment / grid.width**2
    up, down = (spread - drift) / 2, (spread + drift) / 2
    up[-1], down[0] = 0, 0
    targets = (np.maximum(cells - 1, 0), cells, np.minimum(cells + 1, grid.cells - 1))
    return _transition(grid, targets, cells, (down, 1 - up - down, up), 1)


def euler_maruyama(loss: FluctuatingLoss, learning_rate: float) -> Array:
    """The Langevin equation's explicit scheme, step eta: SGD with Gaussian noise of the same C.

    Its first two moments are those of SGD, and so of the discrete Fokker-Planck equation: it is no test of
    the Langevin equation.

    Returns:
        A dense matrix (cells, cells).

    Raises:
        ValueError: somewhere the kick is below a cell's width.
    """
    grid = loss.grid
    deviation = learning_rate * np.sqrt(loss.noise_variance)
    _resolved(deviation / grid.width, grid)
    landing = (grid.centres - learning_rate * loss.mean_gradient).clip(grid.low, grid.high)
    density = np.exp(-0.5 * ((grid.centres[:, None] - landing) / deviation) ** 2)
    return np.asarray(density / density.sum(0))


def langevin_propagator(loss: FluctuatingLoss, learning_rate: float) -> Array:
    """The Langevin equation ``dtheta = -dL dt + sqrt(eta C) dW`` over a time of eta, which is one step.

    Finite volumes with exponentially fitted fluxes (Scharfetter and Gummel; Chang and Cooper), reflecting
    edges, and the exact exponential in time: positive, error of second order in a cell's width.

    Returns:
        A dense matrix (cells, cells).
    """
    return _propagator(loss.grid, -loss.mean_gradient, learning_rate * loss.noise_variance / 2, learning_rate)


def modified_equation(loss: FluctuatingLoss, learning_rate: float) -> Array:
    """The second-order modified equation over a time of eta: it lies between Langevin and SGD.

    Its generator is the logarithm of the Euler-Maruyama step to the next order. With ``T = eta C / 2`` and
    U the mean loss, the drift is ``-U' - (eta / 2) (U' U'' - T U''')`` and the diffusion ``T + (eta / 2) (2
    T U'' + U' T'
    - T T'')``; the third-order term that state-dependent noise brings is left out (Zygalakis, SIAM J. Sci.
      Comput.
    33, 2011). On a quadratic this is ``lambda (1 + e / 2)`` and ``T (1 + e)`` with ``e = eta lambda``. The
    equation of Li, Tai and E (JMLR 20, 2019) has the same drift but not the diffusion's part.

    Returns:
        A dense matrix (cells, cells).

    Raises:
        ValueError: the corrected diffusion is negative somewhere: eta is too large for it.
    """
    grid, eta = loss.grid, learning_rate
    drift, spread = loss.mean_gradient, eta * loss.noise_variance / 2
    slope, spread_slope = (np.gradient(f, grid.width, edge_order=2) for f in (drift, spread))
    bend, spread_bend = (np.gradient(f, grid.width, edge_order=2) for f in (slope, spread_slope))
    corrected = spread + eta / 2 * (2 * spread * slope + drift * spread_slope - spread * spread_bend)
    if corrected.min() < 0:
        where = grid.centres[corrected.argmin()]
        raise ValueError(
            f"expected a positive corrected diffusion, found {corrected.min():g} at {where:g}; take a "
            "smaller learning rate or a narrower grid"
        )
    return _propagator(grid, -drift - eta / 2 * (drift * slope - spread * bend), corrected, eta)


def evolve(transition: csr_array | Array, probability: Array, steps: int) -> Array:
    """The probabilities so many steps later."""
    for _ in range(steps):
        probability = transition @ probability
    return probability


def _propagator(grid: Grid, drift: Array, diffusion: Array, time: float) -> Array:
    """``exp(time generator)`` of ``dP/dt = -d(drift P) + d^2(diffusion P)``."""
    floor = 1e-12 * max(float(diffusion.max()), np.finfo(float).tiny)
    diffusion = np.maximum(diffusion, floor)
    # Flux of w = diffusion P through an edge, with drift / diffusion constant across it.
    pull = (drift[:-1] + drift[1:]) / (diffusion[:-1] + diffusion[1:]) * grid.width
    upward = _bernoulli(-pull) * diffusion[:-1] / grid.width**2
    downward = _bernoulli(pull) * diffusion[1:] / grid.width**2
    generator = np.diag(upward, -1) + np.diag(downward, 1)
    generator -= np.diag(generator.sum(0))
    return np.asarray(expm(time * generator))


def _bernoulli(z: Array) -> Array:
    """``z / (e^z - 1)``."""
    z = np.clip(z, -500, 500)
    small = abs(z) < 1e-8
    return np.where(small, 1 - z / 2, z / np.expm1(np.where(small, 1.0, z)))


def _resolved(kick: Array, grid: Grid) -> None:
    if kick.min() < 1:
        raise ValueError(
            f"expected kicks of at least one cell, found {kick.min():.3g} cells at "
            f"{grid.centres[kick.argmin()]:g}; take more cells, or master_equation, which needs no noise"
        )


def _transition(
    grid: Grid, targets: tuple[Indices, ...], source: Indices, shares: tuple[Array, ...], batches: int
) -> csr_array:
    """Probabilities of going from ``source`` to each of ``targets``, as a matrix; repeated entries add up."""
    rows = np.concatenate([np.ravel(target) for target in targets])
    columns = np.concatenate([np.ravel(source)] * len(targets))
    values = np.concatenate([np.ravel(share) for share in shares]) / batches
    return csr_array((values, (rows, columns)), shape=(grid.cells, grid.cells))
