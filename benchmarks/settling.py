"""How eigenvalues, subspaces and near-flat directions settle with samples and products, on three networks.

Everything is found on some samples and judged on others. One Krylov space per direction is recorded with
its images under both Hessians; every method and every number of products is then read off those records.
What is measured and what came out is in docs/settling.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from _problems import NAMES, SMALL, Problem, trained
from _solvers import training_loss
from torch import Tensor

from sgd_probe.curvature.batches import CurvatureBatch
from sgd_probe.curvature.certify import certify
from sgd_probe.curvature.flat import FINDING_SHARE, noisiest
from sgd_probe.curvature.hessian import HessianOperator, gradient_noise_trace
from sgd_probe.curvature.krylov import KrylovBasis
from sgd_probe.curvature.lanczos import LanczosResult, lanczos
from sgd_probe.curvature.linear_algebra import norm, random_unit
from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.engine.config import ProbeConfig
from sgd_probe.isolation import isolated

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

TOP = 10
BATCH = 64
#: Most products spent on a direction.
PRODUCTS = 12
#: Effective curvature wanted, as a share of |lambda_1|.
WANTED = 0.01
OURS = "ours"
#: Those that a larger Krylov space changes, by label.
METHODS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "no margin": noisiest,
    "harmonic": lambda t, s, c: noisiest(t, s, 1e-12 * c),
    "least ||Hv||": lambda t, s, c: torch.linalg.eigh(s)[1][:, 0],
    OURS: lambda t, s, c: noisiest(t, s, FINDING_SHARE * c),
}
#: Those that cost no products: random vectors, orthogonal to more and more.
FREE = ("random", "outside the top ten", "outside all of Lanczos")
COLOURS = {
    "mlp": "#0072B2",
    "resnet": "#D55E00",
    "transformer": "#009E73",
    OURS: "#D55E00",
    "no margin": "#E69F00",
    "harmonic": "#0072B2",
    "least ||Hv||": "#009E73",
    "random": "#999999",
    "outside the top ten": "#666666",
    "outside all of Lanczos": "#000000",
}


@dataclass(frozen=True)
class Top:
    """The stiffest directions found on some samples, beside as many held-out ones.

    Attributes:
        found: eigenvalues on the finding samples.
        held_out: v.Hv of the same vectors on the held-out samples.
        errors: standard errors of those; NaN for one batch.
        split_half: overlap that the held-out samples certify by themselves; NaN for one batch.
        reference: mean squared cosine with the top subspace of all held-out samples.
    """

    network: str
    seed: int
    samples: int
    found: list[float]
    held_out: list[float]
    errors: list[float]
    split_half: float
    reference: float


@dataclass(frozen=True)
class Flat:
    """One direction: held-out ``lambda_eff / |lambda_1|``, noise as a share of a random direction's."""

    network: str
    seed: int
    samples: int
    method: str
    products: int
    curvature: float
    noise: float


@dataclass(frozen=True)
class Plan:
    """Sizes of the finding set, held-out samples, splits of the data, directions at the largest size."""

    sizes: tuple[int, ...]
    held_out: int
    seeds: int
    directions: int


SIZES = (64, 128, 256, 512, 1024)
#: A few samples carry most of the MLP's curvature, so that splits differ: it takes many, and can afford them.
FULL = {
    "mlp": Plan(SIZES, 1024, seeds=16, directions=4),
    "resnet": Plan(SIZES, 1024, seeds=3, directions=2),
    "transformer": Plan(SIZES, 1024, seeds=3, directions=2),
}
QUICK = Plan((64, 128), 256, seeds=1, directions=1)


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    tops: list[Top] = []
    flats: list[Flat] = []
    if options.read:
        for file in options.read:
            kept = json.loads(file.read_text())
            tops += [Top(**row) for row in kept["tops"]]
            flats += [Flat(**row) for row in kept["flats"]]
    else:
        for name in options.problems:
            for row in _measure(name, QUICK if options.quick else FULL[name]):
                (tops if isinstance(row, Top) else flats).append(row)  # type: ignore[arg-type]
    if options.keep:
        options.keep.write_text(
            json.dumps({"tops": list(map(asdict, tops)), "flats": list(map(asdict, flats))})
        )
    for name in dict.fromkeys(row.network for row in tops):
        _print(name, [t for t in tops if t.network == name], [f for f in flats if f.network == name])
    if options.figure:
        _draw(options.figure, tops, flats)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few samples, one split, under a minute")
    parser.add_argument("--problems", nargs="+", choices=NAMES, default=NAMES, help="some of the networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--figure", type=Path, metavar="FOLDER", help="draw figures (PNG and HTML) there")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="write what was measured, as JSON")
    parser.add_argument("--read", type=Path, nargs="+", metavar="FILE", help="read those, measure nothing")
    return parser.parse_args()


# Measuring


def _measure(name: str, plan: Plan) -> Iterator[Top | Flat]:
    """Train once; for every split of the data and every size, find on some and judge on others."""
    problem, inputs, targets = trained(name, SMALL[name])
    for seed in range(plan.seeds):
        batches = _batches(inputs, targets, seed)
        most = max(plan.sizes) // BATCH
        held_out = batches[most : most + plan.held_out // BATCH]
        with isolated(problem.model), _operator(problem, held_out) as judge:
            reference = _stiffest(judge, seed).vectors
            for size in plan.sizes:
                largest = size == max(plan.sizes)
                with (
                    _operator(problem, batches[: size // BATCH]) as finding,
                    # Half as many judge the smaller sets, without bias too and in half the time.
                    _operator(problem, held_out if largest else held_out[: -(-len(held_out) // 2)]) as half,
                    _operator(problem, held_out[: size // BATCH]) as alike,
                ):
                    stiff = _stiffest(finding, seed)
                    yield _top(name, seed, size, stiff, alike, reference)
                    directions = plan.directions if largest else 1
                    yield from _flat(name, seed, size, stiff, finding, half, directions)
                print(f"{name}: split {seed}, {size} samples", file=sys.stderr, flush=True)


def _batches(inputs: Tensor, targets: Tensor, seed: int) -> list[CurvatureBatch]:
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(1000 + seed))
    pieces = zip(torch.split(inputs[order], BATCH), torch.split(targets[order], BATCH), strict=True)
    return [
        CurvatureBatch.freeze((x, y.flatten()), index, seed=index)
        for index, (x, y) in enumerate(pieces)
        if len(x) == BATCH
    ]


def _operator(problem: Problem, batches: Sequence[CurvatureBatch]) -> HessianOperator:
    return HessianOperator(problem.model, training_loss, batches, ParameterSpace.of(problem.model))


def _stiffest(operator: HessianOperator, seed: int) -> LanczosResult:
    generator = torch.Generator().manual_seed(seed)
    return lanczos(operator, TOP, torch.empty(0), tolerance=ProbeConfig().tolerance, generator=generator)


def _top(
    name: str, seed: int, size: int, stiff: LanczosResult, alike: HessianOperator, reference: Tensor
) -> Top:
    certification = certify(alike, stiff.vectors, top=TOP)
    cosines = stiff.vectors.double() @ reference.double().T
    return Top(
        network=name,
        seed=seed,
        samples=size,
        found=stiff.eigenvalues.tolist(),
        held_out=[certificate.eigenvalue for certificate in certification.certificates],
        errors=[certificate.standard_error for certificate in certification.certificates],
        split_half=certification.split_half_overlap,
        reference=float(cosines.square().sum()) / TOP,
    )


def _flat(
    name: str,
    seed: int,
    size: int,
    stiff: LanczosResult,
    finding: HessianOperator,
    judge: HessianOperator,
    directions: int,
) -> Iterator[Flat]:
    generator = torch.Generator().manual_seed(seed)
    scale = float(stiff.eigenvalues.abs().max())
    judged_scale = abs(_Judged.of(judge, stiff.vectors[:1]).projected.item())
    trace = gradient_noise_trace(judge)

    def row(method: str, products: int, judged: _Judged, weights: Tensor) -> Flat:
        curvature = judged.effective_curvature(weights) / judged_scale
        return Flat(name, seed, size, method, products, curvature, judged.noise(weights) / trace)

    for _ in range(directions):
        start = random_unit(finding.size, torch.empty(0), generator)
        outside = start - stiff.vectors.T @ (stiff.vectors @ start)
        free = torch.stack([start, outside / norm(outside)])
        for method, vector in zip(FREE, free, strict=False):
            yield row(method, 0, _Judged.of(judge, vector.unsqueeze(0)), torch.ones(1, dtype=torch.float64))
        rows, projected, squared = _krylov_space(finding, stiff.krylov, start)
        judged = _Judged.of(judge, rows)
        yield row(FREE[-1], 0, judged.head(1), torch.ones(1, dtype=torch.float64))
        for products in range(2, PRODUCTS + 1):
            within = projected[:products, :products], squared[:products, :products]
            for method, choose in METHODS.items():
                weights = choose(*within, WANTED * scale)
                yield row(method, products, judged.head(products), weights)


def _krylov_space(
    operator: HessianOperator, outside: KrylovBasis, start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal rows, and T and S of their images, as the search for a flat direction has them."""
    basis, images = KrylovBasis(outside.like, operator.size), []
    following = start.clone()
    for _ in range(PRODUCTS):
        outside.orthogonalise(following)
        basis.orthogonalise(following)
        basis.append(following / norm(following))
        images.append(operator.matvec(basis[len(basis) - 1]))
        following = images[-1].clone()
    rows, stack = basis.matrix(), torch.stack(images).double()
    projected = rows.double() @ stack.T
    return rows, (projected + projected.T) / 2, stack @ stack.T


@dataclass(frozen=True)
class _Judged:
    """Quadratic forms of held-out samples on an orthonormal basis, each float64, shape (m, m).

    Attributes:
        projected: of the Hessian.
        squared: of its square: products of different batches only, so without bias.
        covariance: of minibatch gradients, times the number of weights.
    """

    projected: Tensor
    squared: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, operator: HessianOperator, rows: Tensor) -> _Judged:
        count = len(operator.batches)
        total = torch.zeros(rows.shape, dtype=torch.float64)
        own = torch.zeros((len(rows), len(rows)), dtype=torch.float64)
        for products in zip(*(operator.matvec_per_batch(row) for row in rows), strict=True):
            stack = torch.stack([product for _, product in products]).double()
            total += stack / count
            own += stack @ stack.T / count**2
        projected = total @ rows.double().T
        drawn = torch.stack([rows.double() @ gradient.double() for _, gradient in operator.gradients()])
        centred = drawn - drawn.mean(0)
        return cls(
            projected=(projected + projected.T) / 2,
            squared=(total @ total.T - own) * count / max(count - 1, 1),
            covariance=centred.T @ centred * rows.shape[1] / max(count - 1, 1),
        )

    def head(self, size: int) -> _Judged:
        return _Judged(*(form[:size, :size] for form in (self.projected, self.squared, self.covariance)))

    def effective_curvature(self, weights: Tensor) -> float:
        """As a certificate has it: at least |v.Hv|."""
        quotient = abs(float(weights @ self.projected @ weights))
        return max(max(float(weights @ self.squared @ weights), 0.0) / quotient, quotient)

    def noise(self, weights: Tensor) -> float:
        return float(weights @ self.covariance @ weights)


# Summaries


def _inflation(rows: Sequence[Top]) -> float:
    """Finding eigenvalues over held-out ones, sums over the ten: median of the splits."""
    return statistics.median(sum(row.found) / sum(row.held_out) for row in rows)


def _relative_error(rows: Sequence[Top]) -> float:
    """Median standard error of a held-out eigenvalue, as a share of it."""
    return statistics.median(
        error / abs(value) for row in rows for value, error in zip(row.held_out, row.errors, strict=True)
    )


def _median(rows: Sequence[Flat], what: str) -> float:
    return statistics.median(getattr(row, what) for row in rows) if rows else math.nan


def _chosen(rows: Sequence[Flat], method: str, products: int | None, samples: int) -> list[Flat]:
    wanted = 0 if method in FREE else products
    return [r for r in rows if (r.method, r.products, r.samples) == (method, wanted, samples)]


def _print(name: str, tops: Sequence[Top], flats: Sequence[Flat]) -> None:
    sizes = sorted({row.samples for row in tops})
    print(f"\n{name}, the ten stiffest directions, medians of {len({t.seed for t in tops})} splits")
    print("  samples  found/held-out  standard error  split-half  overlap with the reference")
    for size in sizes:
        rows = [row for row in tops if row.samples == size]
        line = (
            f"  {size:7d} {_inflation(rows):15.2f} {_relative_error(rows):15.1%}"
            f" {statistics.median(r.split_half for r in rows):11.2f}"
            f" {statistics.median(r.reference for r in rows):11.2f}"
        )
        print(line.replace("nan%", "   -").replace("nan", "  -"))
    grid = [*((size, PRODUCTS) for size in sizes), *((sizes[-1], p) for p in range(2, PRODUCTS, 2))]
    print(f"{name}, one flat direction: held-out lambda_eff/|lambda_1| (noise share), medians")
    print(f"  {'samples, products':23}" + "".join(f"{f'{s}, {p}':>18}" for s, p in grid))
    for method in (*FREE, *METHODS):
        cells = [_chosen(flats, method, products, size) for size, products in grid]
        values = [f"{_median(rows, 'curvature'):.4f} ({_median(rows, 'noise'):.2f})" for rows in cells]
        print(f"  {method:23}" + "".join(f"{value:>18}" for value in values), flush=True)
    silent = [statistics.mean(r.noise < 0.1 for r in _chosen(flats, OURS, p, size)) for size, p in grid]
    print(f"  {'ours, noise below 0.1':23}" + "".join(f"{value:>18.0%}" for value in silent))


# Figures


def _draw(folder: Path, tops: Sequence[Top], flats: Sequence[Flat]) -> None:
    """Every figure as a page of its own and as a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "settling-top": _top_figure(tops),
        "settling-products": _flat_figure(flats, "products"),
        "settling-samples": _flat_figure(flats, "samples"),
    }
    screenshot = Path(__file__).parents[1] / "docs" / "screenshot.py"
    for name, figure in figures.items():
        page = folder / f"{name}.html"
        figure.write_html(page, include_plotlyjs=True, config={"displayModeBar": False})
        size = f"{figure.layout.width + 16},{figure.layout.height + 16}"
        picture = folder / f"{name}.png"
        subprocess.run([sys.executable, screenshot, page, picture, "--size", size], check=True)


def _top_figure(tops: Sequence[Top]) -> Figure:
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    titles = ("Eigenvalues: found / held-out", "Standard error of a held-out one", "Overlap of the top ten")
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles, horizontal_spacing=0.08)
    for name in dict.fromkeys(row.network for row in tops):
        sizes = sorted({row.samples for row in tops if row.network == name})
        sets = [[r for r in tops if r.network == name and r.samples == size] for size in sizes]
        curves = (
            (1, [_inflation(rows) for rows in sets], "solid", name),
            (2, [100 * _relative_error(rows) for rows in sets], "solid", name),
            (3, [statistics.median(r.reference for r in rows) for rows in sets], "solid", name),
            (3, [statistics.median(r.split_half for r in rows) for rows in sets], "dot", name),
        )
        for column, values, dash, label in curves:
            line = {"color": COLOURS[name], "dash": dash, "width": 2}
            trace = go.Scatter(x=sizes, y=values, name=label, line=line, marker={"size": 7})
            figure.add_trace(trace.update(showlegend=column == 1), row=1, col=column)
    for dash, label in (("solid", "with the reference"), ("dot", "split-half")):
        line = {"color": "black", "dash": dash, "width": 2}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=line, name=label), row=1, col=3)
    figure.add_hline(y=1, line={"color": "black", "width": 1}, row=1, col=1)
    figure.update_xaxes(title="samples", type="log", tickvals=list(SIZES))
    figure.update_yaxes(title="ratio of sums of ten", row=1, col=1)
    figure.update_yaxes(title="% of the eigenvalue", rangemode="tozero", row=1, col=2)
    figure.update_yaxes(title="mean squared cosine", range=[0, 1.03], row=1, col=3)
    return _finish(figure, 1150, 430)


def _flat_figure(flats: Sequence[Flat], along: str) -> Figure:
    """Held-out effective curvature above, noise below, one column a network."""
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    names = list(dict.fromkeys(row.network for row in flats))
    most = max(row.samples for row in flats)
    figure = make_subplots(
        rows=2, cols=len(names), subplot_titles=names, shared_xaxes=True, shared_yaxes="rows",
        vertical_spacing=0.06, horizontal_spacing=0.03,
    )  # fmt: skip
    for column, name in enumerate(names, 1):
        own = [row for row in flats if row.network == name]
        sizes = sorted({row.samples for row in own})
        for method in (*FREE, *METHODS):
            if along == "samples":
                places, sets = sizes, [_chosen(own, method, PRODUCTS, size) for size in sizes]
            else:
                # What costs no products is a level line.
                places = [2, PRODUCTS] if method in FREE else list(range(2, PRODUCTS + 1))
                sets = [_chosen(own, method, products, most) for products in places]
            for row, what in enumerate(("curvature", "noise"), 1):
                line = {
                    "color": COLOURS[method],
                    "dash": "dot" if method in FREE else "solid",
                    "width": 3.5 if method == OURS else 2,
                }
                trace = go.Scatter(
                    x=places,
                    y=[_median(rows, what) for rows in sets],
                    mode="lines" if method in FREE and along == "products" else "lines+markers",
                    name=method,
                    legendgroup=method,
                    line=line,
                    marker={"size": 6},
                    showlegend=row == column == 1,
                )
                figure.add_trace(trace, row=row, col=column)
        figure.add_hline(y=2 * WANTED, line={"color": "black", "width": 1}, row=1, col=column)
        figure.add_hline(y=0.1, line={"color": "black", "width": 1}, row=2, col=column)
    title = "samples that find" if along == "samples" else "products for a direction"
    ticks = {"type": "log", "tickvals": list(SIZES)} if along == "samples" else {"dtick": 2}
    figure.update_xaxes(**ticks)
    figure.update_xaxes(title=title, row=2)
    levels = [base * 10**power for power in range(-4, 3) for base in (1, 2, 5)]
    figure.update_yaxes(type="log", tickvals=levels, ticktext=[f"{level:g}" for level in levels])
    figure.update_yaxes(title="held-out λ_eff / |λ₁|", row=1, col=1)
    figure.update_yaxes(title="noise / a random direction's", row=2, col=1)
    return _finish(figure, 1150, 680)


def _finish(figure: Figure, width: int, height: int) -> Figure:
    return figure.update_layout(
        template="plotly_white",
        width=width,
        height=height,
        font={"size": 13},
        margin={"l": 70, "r": 20, "t": 40, "b": 90},
        legend={"orientation": "h", "y": -0.2 if height < 500 else -0.12, "x": 0},
    )


if __name__ == "__main__":
    main()
