"""How often a verdict is right: the package's own rule on simulated modes whose truth is known.

Thousands of windows a scenario, each with a draw of its own. What is asked of a rate is kept if it holds at
the unfavourable end of the rate's 95% binomial interval (Clopper and Pearson), missed if it fails at the
favourable end too, and open in between. A share of confined modes is beyond reach where the best test that
there can be, told all that the rule must find out, misses it too. docs/verdicts.md explains the rule.
With ``--figure FOLDER`` it also writes the pictures of that page, for which chromium must be on PATH.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _figures import picture
from _most import most_confined
from _replicas import Truth
from scipy.stats import beta

from sgd_probe.dynamics.verdict import judge, weigh
from sgd_probe.result import Verdict

Rates = Mapping[Verdict, float]
#: Windows from which the best possible test is known to a tenth of a per cent.
MOST_REPLICAS = 60_000

FAMILIES: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "student_3": {"student": True},
    "momentum": {"momentum": 0.9},
    "cosine": {"cosine": True},
    "momentum_cosine": {"momentum": 0.9, "cosine": True},
}
ODD: dict[str, dict[str, Any]] = {
    "ar_-0.3": {"correlation": -0.3},
    "ar_+0.3": {"correlation": 0.3},
    "clipped": {"clip": 2.5},
    "fading_10": {"fading": 0.1},
    "fading_100": {"fading": 0.01},
}


@dataclass(frozen=True)
class Bar:
    """What is asked of a scenario: a share of verdicts, and the bound it has to keep.

    Attributes:
        name: for people.
        counted: whether a verdict counts.
        bound: of the share of those that do.
        at_most: the bound is the largest share, else the smallest.
    """

    name: str
    counted: Callable[[Verdict], bool]
    bound: float
    at_most: bool

    @property
    def asks_for_confined(self) -> bool:
        """Of no verdict but this one, as many as possible."""
        return not self.at_most and [v for v in Verdict if self.counted(v)] == [Verdict.CONFINED]

    def outcome(self, rates: Rates, replicas: int) -> str:
        share = sum(rate for verdict, rate in rates.items() if self.counted(verdict))
        low, high = binomial_interval(round(share * replicas), replicas)
        if high <= self.bound if self.at_most else low >= self.bound:
            return "kept"
        return "missed" if (low > self.bound if self.at_most else high < self.bound) else "open"


def at_most(bound: float, *verdicts: Verdict) -> Bar:
    return Bar(f"{'/'.join(verdicts)} <= {bound:.1%}", lambda v: v in verdicts, bound, True)


def at_least(bound: float, *verdicts: Verdict) -> Bar:
    return Bar(f"{'/'.join(verdicts)} >= {bound:.1%}", lambda v: v in verdicts, bound, False)


#: Share of flat modes that may be called confined, by any rule.
FALSE_CONFINED = 0.055
FREE = (Verdict.DIFFUSIVE, Verdict.SAMPLING_CONFINED)
FLAT = (
    at_most(FALSE_CONFINED, Verdict.CONFINED),
    Bar("wrong <= 7.0%", lambda v: v not in (*FREE, Verdict.UNDETERMINED), 0.07, True),
    at_least(0.85, Verdict.DIFFUSIVE),
)
TWENTY = (at_most(0.02, *FREE), at_least(0.93, Verdict.CONFINED))
THIRTY = (at_most(0.02, *FREE), at_least(0.995, Verdict.CONFINED))
SHUFFLED_FLAT = (at_most(0.01, Verdict.CONFINED),)
SHUFFLED_FIFTY = (at_least(0.95, Verdict.CONFINED), at_most(0.02, *FREE))


def right_or_withheld(*right: Verdict) -> tuple[Bar, ...]:
    return (at_least(0.95, *right, Verdict.UNDETERMINED),)


@dataclass(frozen=True)
class Scenario:
    """A truth, how many replicas it gets in a full run, and what is asked of it."""

    name: str
    truth: Truth
    bars: tuple[Bar, ...] = ()
    replicas: int = 8_000

    def rates(self, replicas: int, seed: int, told: bool = True) -> dict[Verdict, float]:
        """Share of each verdict; a window that the rule refuses is undetermined.

        Args:
            replicas: how many windows.
            seed: of the simulation.
            told: the statistics know how minibatches are drawn.
        """
        found: Counter[Verdict] = Counter()
        for statistics in self.truth.statistics(replicas, seed, told):
            try:
                evidence = weigh(statistics, self.truth.momentum)
            except ValueError:
                found[Verdict.UNDETERMINED] += statistics.modes
                continue
            found.update(judge(one).verdict for one in evidence)
        return {verdict: found[verdict] / replicas for verdict in Verdict}

    def outcome(self, bar: Bar, rates: Rates, count: int, seed: int) -> str:
        """Kept, missed or open; and where it is not kept, whether any rule could."""
        outcome, truth = bar.outcome(rates, count), self.truth
        if outcome == "kept" or not bar.asks_for_confined or truth != truth.independent_gaussian:
            return outcome
        most, among = most_confined(truth, FALSE_CONFINED, MOST_REPLICAS, seed), MOST_REPLICAS
        best = binomial_interval(round(most * among), among)[1]
        return f"beyond reach (no rule has more than {most:.1%})" if best < bar.bound else outcome


def scenarios() -> Iterator[Scenario]:
    yield from _independent()
    yield from _shuffled()
    yield from _odd()


def replicas(steps: int) -> int:
    """Windows of a full run: more where they are cheap and rates come near to what is asked."""
    return 100_000 if steps <= 100 else 20_000 if steps <= 1000 else 8_000


def _independent() -> Iterator[Scenario]:
    for family, changes in FAMILIES.items():
        for steps in (100, 300, 1000, 5000):
            truth = Truth(steps=steps, **changes)
            # Ten memories under a falling rate: seldom confined, and not more wrongly.
            few = truth.momentum and truth.cosine and steps <= 100
            for kappa, bars in ((0, FLAT), (20, TWENTY), (30, THIRTY)):
                name, asked = f"{family}, T={steps}, kappa={kappa}", bars[:1] if few and kappa else bars
                yield Scenario(name, replace(truth, kappa=kappa), asked, replicas(steps))
    for kappa in (3, 6, 10, 15):
        yield Scenario(f"gaussian, T=1000, kappa={kappa}", Truth(kappa=kappa))


def _shuffled() -> Iterator[Scenario]:
    for batches in (20, 50, 200):
        for kappa, bars in ((0, SHUFFLED_FLAT), (20, ()), (50, SHUFFLED_FIFTY)):
            truth = Truth(kappa=kappa, batches=batches)
            count = 8_000 if kappa else 20_000
            yield Scenario(f"shuffled n={batches}, T=1000, kappa={kappa}", truth, bars, count)
    for kappa, bars in ((0, SHUFFLED_FLAT), (20, ()), (50, SHUFFLED_FIFTY)):
        truth = Truth(kappa=kappa, samples=1797)
        yield Scenario(f"shuffled N=1797 B=64, T=1000, kappa={kappa}", truth, bars, 4_000)
    # Between a fifth of an epoch and five of them.
    for batches in (400, 1000, 2000, 4000, 6000):
        for kappa, bars in ((0, FLAT[:2]), (20, TWENTY[:1]), (30, THIRTY[:1]), (50, SHUFFLED_FIFTY)):
            truth = Truth(kappa=kappa, batches=batches)
            yield Scenario(f"shuffled n={batches}, T=1000, kappa={kappa}", truth, bars)
    others: dict[str, dict[str, Any]] = {"momentum": {"momentum": 0.9}, "half fresh": {"fresh": 0.5}}
    for name, changes in others.items():
        for kappa, bars in ((0, FLAT[:2]), (50, SHUFFLED_FIFTY)):
            truth = Truth(kappa=kappa, batches=50, **changes)
            yield Scenario(f"shuffled n=50, {name}, T=1000, kappa={kappa}", truth, bars)


def _odd() -> Iterator[Scenario]:
    for name, changes in ODD.items():
        for steps in (100, 300, 1000):
            for kappa in (0, 20, 30):
                right = right_or_withheld(Verdict.CONFINED if kappa else Verdict.DIFFUSIVE)
                truth = Truth(kappa=kappa, steps=steps, **changes)
                yield Scenario(f"{name}, T={steps}, kappa={kappa}", truth, right, replicas(steps))
    for steps in (100, 1000):
        truth = Truth(kappa=30, steps=steps, away=8)
        name = f"weight decay alone, T={steps}, kappa=30"
        yield Scenario(name, truth, right_or_withheld(Verdict.CONFINED))
    for pull, right in ((2.0, ()), (4.0, ()), (7.0, right_or_withheld(Verdict.DRIFTING))):
        yield Scenario(f"pulled {pull:g} times, T=1000, kappa=0", Truth(pull=pull), right)
    for kappa, right in (
        (-3, (at_most(0.2, *FREE),)),
        (-8, right_or_withheld(Verdict.UNSTABLE, Verdict.DRIFTING)),
    ):
        yield Scenario(f"unstable, T=500, kappa={kappa}", Truth(kappa=kappa, steps=500), right)
    # Too small to be told from chance in so few steps.
    weak = Truth(steps=100, correlation=-0.15)
    yield Scenario("ar_-0.15, T=100, kappa=0", weak, replicas=replicas(100))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="fewer replicas and short windows, under a minute"
    )
    parser.add_argument(
        "--json", action="store_true", help="print {scenario: {verdict: rate}} as the last line"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="scenarios whose name has this text")
    parser.add_argument(
        "--figure", type=Path, metavar="FOLDER", help="write the pictures of docs/verdicts.md"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started, outcomes, summary = time.perf_counter(), Counter[str](), {}
    # Seeds go by place among all scenarios: a row is the same whatever else is run.
    chosen = [(seed, s) for seed, s in enumerate(scenarios(), options.seed) if options.only in s.name]
    if options.quick:
        chosen = [(seed, s) for seed, s in chosen if s.truth.steps * (1 + s.truth.momentum) <= 1000]
    width = max((len(s.name) for _, s in chosen), default=0)
    print(" " * width, *(f"{verdict[:9]:>9}" for verdict in SHOWN), " asked")
    for seed, scenario in chosen:
        count = min(scenario.replicas, 500) if options.quick else scenario.replicas
        rates = scenario.rates(count, seed)
        summary[scenario.name] = {str(verdict): rate for verdict, rate in rates.items() if rate}
        found = [(bar.name, scenario.outcome(bar, rates, count, seed)) for bar in scenario.bars]
        outcomes.update(outcome.partition(" (")[0] for _, outcome in found)
        shown = " ".join(f"{rates[verdict]:9.2%}" for verdict in SHOWN)
        remarks = [f"{outcome}: {name}" for name, outcome in found if outcome != "kept"]
        print(f"{scenario.name:<{width}} {shown}  {'; '.join(remarks) or 'kept' * bool(found)}", flush=True)
    took, counts = time.perf_counter() - started, ", ".join(f"{n} {what}" for what, n in outcomes.items())
    print(f"{len(chosen)} scenarios in {took:.0f} s; bounds: {counts}", flush=True)
    if options.figure:
        write_figures(options.figure, options.seed)
    if options.json:
        print(json.dumps(summary))
    return 0


SHOWN = (
    Verdict.CONFINED,
    Verdict.DIFFUSIVE,
    Verdict.SAMPLING_CONFINED,
    Verdict.DRIFTING,
    Verdict.UNSTABLE,
    Verdict.UNDETERMINED,
)


def binomial_interval(found: int, count: int) -> tuple[float, float]:
    """95% interval of a share (Clopper and Pearson)."""
    low = float(beta.ppf(0.025, found, count - found + 1)) if found else 0.0
    high = float(beta.ppf(0.975, found + 1, count - found)) if found < count else 1.0
    return low, high


def write_figures(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _power_figure(folder, seed)
    _epochs_figure(folder, seed)


FONT = {"family": "Helvetica, Arial, sans-serif", "size": 16, "color": "#222"}
LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": FONT,
    "margin": {"l": 90, "r": 30, "t": 70, "b": 70},
    "legend": {"bgcolor": "rgba(255,255,255,0.85)"},
}
COLOURS = {
    Verdict.CONFINED: "#0072B2",
    Verdict.DIFFUSIVE: "#E69F00",
    Verdict.UNDETERMINED: "#999999",
}


def _power_figure(folder: Path, seed: int) -> None:
    """Share of each verdict against the relaxation times in the window."""
    import plotly.graph_objects as go

    kappas = (0, 1, 2, 4, 6, 8, 10, 12, 15, 18, 20, 25, 30, 40)
    found = [Scenario("", Truth(kappa=kappa)).rates(4_000, seed + i) for i, kappa in enumerate(kappas)]
    figure = go.Figure()
    for verdict, colour in COLOURS.items():
        figure.add_scatter(
            x=kappas,
            y=[100 * rates[verdict] for rates in found],
            name=str(verdict),
            mode="lines+markers",
            line={"color": colour, "width": 3},
            marker={"size": 8},
        )
    figure.update_layout(
        **LAYOUT,
        title="What one window of 1000 steps says of a mode",
        xaxis_title="relaxation times in the window (0: flat)",
        yaxis_title="windows (%)",
    )
    picture(figure, folder / "verdicts-power.png")


def _epochs_figure(folder: Path, seed: int) -> None:
    """Flat modes called confined under a shuffled loader, against the epochs in the window."""
    import plotly.graph_objects as go

    steps, epochs = 1000, (0.1, 0.2, 0.33, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
    figure = go.Figure()
    for told, kappa, name, line in (
        (False, 0, "flat, the loader ignored", {"color": "#D55E00", "dash": "dash", "width": 3}),
        (True, 0, "flat", {"color": "#E69F00", "width": 3}),
        (True, 20, "20 relaxation times", {"color": "#56B4E9", "width": 3}),
        (True, 50, "50 relaxation times", {"color": "#0072B2", "width": 3}),
    ):
        shares = []
        for index, count in enumerate(epochs):
            truth = Truth(kappa=kappa, steps=steps, batches=max(round(steps / count), 2))
            shares.append(100 * Scenario("", truth).rates(2_000, seed + index, told)[Verdict.CONFINED])
        figure.add_scatter(x=epochs, y=shares, name=name, mode="lines+markers", line=line, marker={"size": 8})
    figure.update_layout(
        **LAYOUT,
        title="Modes called confined under a shuffled loader, windows of 1000 steps",
        xaxis={
            "type": "log",
            "title": "epochs in the window",
            "tickvals": [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50],
        },
        yaxis_title="called confined (%)",
    )
    picture(figure, folder / "verdicts-epochs.png")


if __name__ == "__main__":
    sys.exit(main())
