"""What windows are going to cost, and what the preflight says of the run."""

from __future__ import annotations

import math

from sgd_probe.curvature.space import ParameterSpace
from sgd_probe.engine.config import ProbeConfig
from sgd_probe.engine.ledger import duration
from sgd_probe.engine.planning import (
    SELF_TEST_GRADIENTS,
    Foretold,
    Schedule,
    basis_passes,
    closing_gradients,
    gradients_per_batch,
    windows_ahead,
)
from sgd_probe.engine.sampling import Sampling
from sgd_probe.engine.survey import Survey


def expected_pauses(survey: Survey, gradient: float) -> tuple[float, float]:
    """Pauses of the first window in seconds, opening and closing.

    Args:
        survey: sized up.
        gradient: seconds of one.
    """
    means = survey.frugality.used
    each, closing = (
        count(means.config, means.keep_graphs) for count in (gradients_per_batch, closing_gradients)
    )
    opening = SELF_TEST_GRADIENTS + (each - closing) * means.batches
    passes = basis_passes(means.config) * survey.pass_seconds
    return gradient * opening + passes, gradient * closing * means.batches


def foretell(survey: Survey, schedule: Schedule, accumulation: int, step: int) -> Foretold:
    """What is said of a run before its first window.

    Args:
        survey: sized up.
        schedule: of its windows.
        accumulation: microbatches in an optimizer step.
        step: optimizer steps done.
    """
    means = survey.frugality.used
    pauses = expected_pauses(survey, survey.cost.seconds)
    opening = step + math.ceil(2 * means.batches / accumulation)
    windows = windows_ahead(
        survey.trained.config,
        schedule.steps_left(opening),
        _training_seconds(survey, schedule, accumulation),
        sum(pauses),
    )
    return Foretold(opening, pauses[0], means.bytes(survey.frugality.sizes), windows)


def announcement(
    survey: Survey,
    schedule: Schedule,
    sampling: Sampling,
    accumulation: int,
    foretold: Foretold,
    samples: int,
) -> tuple[str, ...]:
    """The plan of a run, a sentence an item.

    Args:
        survey: sized up.
        schedule: of its windows.
        sampling: what the loader does.
        accumulation: microbatches in an optimizer step.
        foretold: by :func:`foretell`.
        samples: of a batch.
    """
    means, sizes = survey.frugality.used, survey.frugality.sizes
    config, count, graphs = means.config, means.batches, means.graph_bytes(sizes)
    optimizer = survey.trained.read_optimizer()
    rebuilt = "" if means.keep_graphs else ", rebuilt for every product"
    stiff = f"{config.top} stiff" + (f", {config.interior} interior" if config.interior else "")
    withheld = optimizer.withheld or sampling.withheld
    shuffled = sampling.scheme == "without_replacement" and not sampling.withheld
    lines = (
        f"{survey.trained.space.dimension:,} weights; {stiff} and {config.flat} near-flat directions from "
        f"2 x {count} training batches ({count * samples} samples find them, as many certify).",
        f"The first window opens at about optimizer step {foretold.step:.0f} and "
        f"pauses the training for about {duration(foretold.pause)}; it needs about "
        f"{foretold.bytes / 2**20:,.0f} MB "
        f"({graphs / 2**20:,.0f} MB of graphs{rebuilt}).",
        *(f"Memory is short: {note}." for note in survey.frugality.notes),
        *_ways(survey),
        _pace(survey, schedule, accumulation, foretold.windows),
        f"Optimizer: {optimizer.describe()}.",
        f"Loader: {sampling.describe()}."
        + (" Over whole epochs that alone holds flat directions back." if shuffled else ""),
        f"Verdicts will be withheld: {withheld}." if withheld else "",
        repetition_note(sampling, count),
    )
    return tuple(line for line in lines if line)


def repetition_note(sampling: Sampling, batches: int) -> str:
    """A warning where both curvature sets cannot but hold the same batches; "" where they can.

    Args:
        sampling: what the loader does.
        batches: in each set.
    """
    needed = 2 * batches
    if sampling.scheme == "with_replacement" or sampling.batches is None or sampling.batches >= needed:
        return ""
    return (
        f"An epoch has {sampling.batches} batches where the two curvature sets need {needed}: they may "
        "share samples, and held-out values are then not independent of those on the finding batches."
    )


def storage_note(space: ParameterSpace, config: ProbeConfig) -> str:
    """What is missing from the run folder where nobody holds a whole direction; "" elsewhere.

    Args:
        space: the probed parameters.
        config: the knobs.
    """
    if not (space.divided and config.save_vectors):
        return ""
    return "The directions are not stored: each process holds a part of them, and they are never gathered."


def _ways(survey: Survey) -> list[str]:
    """How the curvature is taken, a sentence an item."""
    trained, found = survey.trained, []
    if trained.dtype is not None:
        kind = str(trained.space.dtype).removeprefix("torch.")
        found.append(
            f"The weights are in {kind}: curvature is that of the loss in float32 at these weights; "
            f"steps and gradients are those of the {kind} weights, where small steps are rounded away."
        )
    if trained.space.divided:
        found.append(
            "Each process holds a part of every weight: Hessian-vector products are finite differences "
            "of gradients, and where they are unreliable, as on ReLU networks in float32, no window "
            "opens; directions are not stored."
        )
    elif trained.by_differences:
        found.append(
            "Hessian-vector products are finite differences of gradients (`second_derivatives`); where "
            "they are unreliable, as on ReLU networks in float32, no window opens."
        )
    if survey.pieces_gap is not None:
        piece = survey.frugality.used.config.microbatch
        found.append(
            f"Curvature batches are taken in pieces of at most {piece} samples; on one batch, loss and "
            f"gradient agree with those of the whole to {survey.pieces_gap:.0e}."
        )
    return found


def _pace(survey: Survey, schedule: Schedule, accumulation: int, windows: float) -> str:
    config = survey.trained.config
    count = "" if math.isinf(windows) else f"; {windows:.0f} over the run"
    if config.every_n_steps is not None:
        return f"A window opens every {config.every_n_steps} optimizer steps, whatever it costs{count}."
    seconds = _training_seconds(survey, schedule, accumulation)
    window_seconds = sum(expected_pauses(survey, survey.cost.seconds))
    if window_seconds > max(config.grace_seconds, config.max_overhead * seconds):
        enough = min(1.2 * window_seconds / seconds, 0.99)
        return (
            f"That may be more than {config.max_overhead:.0%} of a run of about {duration(seconds)}: "
            f"then no window opens. max_overhead={enough:.2g} would allow one; every_n_steps opens them "
            "whatever they cost."
        )
    count = "" if math.isinf(windows) else f": about {windows:.0f} over the run"
    return f"Windows open as {config.max_overhead:.0%} of the training's time allows{count}."


def _training_seconds(survey: Survey, schedule: Schedule, accumulation: int) -> float:
    """About what is left of it: a training step takes about a gradient for each microbatch."""
    return survey.cost.seconds * accumulation * schedule.steps_left(schedule.next_step)
