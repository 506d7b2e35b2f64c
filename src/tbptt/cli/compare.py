"""`tbptt compare`: estimators side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tbptt.cli.launch import tell
from tbptt.cli.spelling import parse_estimator
from tbptt.cli.subject import Subject, check_page, open_subject
from tbptt.comparison import Comparison
from tbptt.comparison import compare as measure
from tbptt.estimators import TBPTT, Estimator
from tbptt.length import Adaptive
from tbptt.report import comparison_page

__all__ = ["compare"]

_SECONDS = 10.0


def compare(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN|DATA", help="The directory of a run; or what tbptt train takes: ecg, a file, ..."),
    ],
    estimators: Annotated[
        list[str] | None,
        typer.Option(
            "--estimator",
            "-e",
            metavar="CALL",
            help="As in Python: 'TBPTT(k1=8, k2=64)'; repeat it.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Train so long with each, on its own clock; else 10.")
    ] = None,
    updates: Annotated[int | None, typer.Option(min=1, metavar="N", help="Or so many updates.")] = None,
    points: Annotated[int, typer.Option(min=1, metavar="N", help="Spans on which gradients are compared.")] = 8,
    span: Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps of each; else by the k1s.")] = None,
    burn_in: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Steps before the first; else by the k2s.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, metavar="N", help="Draws of each random estimator.")] = 8,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Of all random numbers.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("compare.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Of DATA: a key as for tbptt train; repeatable."),
    ] = None,
) -> None:
    """Compare estimators: bias, variance and cosine of their gradients, time, memory, and training against the clock.

    With a run: its data, and its trained model to measure at and to go on from, with a fresh optimizer and a constant
    rate; the run stays as it is. With data: fresh weights. Without -e: TBPTT around the usual k1. The table goes to
    stdout, a page with figures to --out, its numbers beside it as Parquet.
    """
    chosen = [parse_estimator(each) for each in estimators or ()]
    check_page(out, "compare.html")
    subject = open_subject(source, seed, assignments)
    chosen = chosen or _usual(subject)
    if seconds is None and updates is None:
        seconds = _SECONDS
    _tell_plan(subject, chosen, seconds, updates)
    parts, optimizer = subject.parts, subject.config.optimizer
    found = measure(
        chosen,
        parts.model,
        parts.data.train,
        loss=parts.loss,
        optimizer=lambda parameters: optimizer.kind(parameters, **optimizer.arguments()),
        seconds=seconds,
        updates=updates,
        guards=parts.guards,
        held_out=parts.data.held_out,
        metrics=parts.metrics if parts.data.held_out is not None else None,
        points=points,
        span=span,
        burn_in=burn_in,
        repeats=repeats,
        seed=subject.config.run.seed,
    )
    found = replace(found, notes=(*found.notes, *_about_rates(subject), _about_weights(subject, source)))
    _show(found, out, as_json=as_json)


def _about_rates(subject: Subject) -> list[str]:
    if subject.config.optimizer.predictor_lr is None:
        return []
    return ["in training all weights have one rate, optimizer.lr: optimizer.predictor_lr is for tbptt train"]


def _about_weights(subject: Subject, source: str) -> str:
    if subject.is_trained:
        return f"weights of update {subject.update} of {source}; training went on from there with a fresh optimizer"
    return (
        "fresh weights: a model that has not learned yet to look back hides the bias of short look-backs; "
        "tbptt compare RUN measures a trained one"
    )


def _usual(subject: Subject) -> list[Estimator]:
    """Return look-backs around the usual k1, and for a run what it was trained with."""
    parts = subject.parts
    k1 = parts.estimator.next_steps(parts.estimator.init(parts.model, parts.data.train.lanes))
    chosen: list[Estimator] = [TBPTT(k1=k1, k2=k2) for k2 in (k1, 2 * k1, 4 * k1)]
    chosen.append(TBPTT(k1=k1, k2=Adaptive(max=max(64, 4 * k1))))
    return chosen if not subject.is_trained or parts.estimator in chosen else [parts.estimator, *chosen]


def _tell_plan(subject: Subject, chosen: list[Estimator], seconds: float | None, updates: int | None) -> None:
    ends = [f"{seconds:g} s" if seconds is not None else "", f"{updates} updates" if updates is not None else ""]
    tell(
        f"comparing {len(chosen)} estimators on {subject.config.data.source}: gradients, costs, then training for "
        f"{' or '.join(filter(None, ends))} with each"
    )


def _show(found: Comparison, out: Path, *, as_json: bool) -> None:
    page = comparison_page(found).write(out)
    print(found.to_json() if as_json else found)
    tell(f"page      {page}")
