"""`tbptt horizon`: how far back must the gradient go?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from tbptt.cli.launch import tell
from tbptt.cli.subject import Subject, check_page, open_subject
from tbptt.errors import ConfigError, TbpttError
from tbptt.horizon import Recommendation, influences, measure
from tbptt.horizon.recommend import Limits, check_tolerance
from tbptt.report import Strip, horizon_page

__all__ = ["horizon"]

_STRIPS, _STRIP_STEPS = 6, (200, 20)


def horizon(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN|DATA", help="The directory of a run; or what tbptt train takes: ecg, a file, ..."),
    ],
    tolerance: Annotated[float, typer.Option(metavar="X", help="Relative bias to allow, 0 to 1.")] = 0.1,
    max_lag: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="How far back to look; else as far as it takes, up to 1024.")
    ] = None,
    probes: Annotated[int, typer.Option(min=3, metavar="N", help="Losses sent back, each in all lanes.")] = 16,
    k1: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Steps between updates, if they are given.")
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="For the look-back: 500MB, 2GB, or bytes.")] = None,
    time: Annotated[float | None, typer.Option(metavar="S", help="Seconds a step of the stream may take.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Of the places, and of fresh weights.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("horizon.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Of DATA: a key as for tbptt train; repeatable."),
    ] = None,
) -> None:
    """Measure how far back gradients go, and recommend k1 and k2.

    Of a run: its trained model on its data. Of data: fresh weights, whose curve is a lower bound. The table and the
    recommendation go to stdout, a page with figures to --out, its numbers beside it as Parquet. Exits with 1 where
    no recommendation can be made.
    """
    check_page(out, "horizon.html")
    num_bytes = None if memory is None else _num_bytes(memory)
    check_tolerance(tolerance)  # before anything is measured
    Limits(k1, num_bytes, time)
    subject = open_subject(source, seed, assignments)
    parts = subject.parts
    longest = f"{max_lag} steps back" if max_lag else "as far back as it takes"
    tell(f"sending {probes} losses {longest} on {subject.config.data.source}")
    report = measure(
        parts.model, parts.loss, parts.data.train, max_lag=max_lag, probes=probes, seed=subject.config.run.seed
    )
    refused: ConfigError | None = None
    chosen: Recommendation | None = None
    try:
        chosen = report.recommend(tolerance, k1=k1, memory=num_bytes, time=time)
    except ConfigError as error:
        refused = error
    why = refused.message if refused is not None else ""
    page = horizon_page(report, recommendation=chosen, refused=why, strips=_strips(subject)).write(out)
    if as_json:
        print(json.dumps(json.loads(report.to_json()) | {"recommendation": _plain(chosen)}))
    else:
        print(report)
        if chosen is not None:
            print(f"\n{chosen}")
    if subject.update is not None:
        tell(f"weights   of update {subject.update} of {source}")
    tell(f"page      {page}")
    if refused is not None:  # no mistake of the caller's: what was measured does not allow for it
        raise TbpttError(refused.message, fix=refused.fix) from refused


def _num_bytes(text: str) -> float:
    units = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "b": 1.0}
    number, scale = text.strip().lower(), 1.0
    for unit, size in units.items():
        if number.endswith(unit):
            number, scale = number.removesuffix(unit), size
            break
    try:
        found = float(number) * scale
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ConfigError(
            f"--memory was expected to be a size above 0, as 500MB, 2GB or bytes, but {text!r} came", fix="--memory 2GB"
        )
    return found


def _strips(subject: Subject) -> list[Strip]:
    """Return what past characters did to some predictions; nothing where the data are no text."""
    facts, parts = subject.parts.data.facts, subject.parts
    if facts.vocabulary is None or parts.data.held_out is None:
        return []
    for steps in _STRIP_STEPS:
        try:
            found = influences(parts.model, parts.loss, parts.data.held_out, steps=steps, count=_STRIPS)
            break
        except ConfigError:  # a short text: as far back as there is room for
            continue
    else:
        tell("the held-out text is too short to show what each character did")
        return []
    strips: list[Strip] = []
    for each in found:
        assert each.target is not None
        characters = "".join(facts.vocabulary[symbol] for symbol in each.inputs.tolist())
        predicted = facts.vocabulary[int(each.target)]
        strips.append(Strip(characters, each.norms.tolist(), predicted, math.exp(-each.loss)))
    return strips


def _plain(chosen: Recommendation | None) -> dict[str, Any] | None:
    return None if chosen is None else {**vars(chosen), "why": list(chosen.why)}
