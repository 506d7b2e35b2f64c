"""Runs to report on, pages to look at, and a browser to look with."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tbptt.comparison import Comparison, Curve, Row
from tbptt.horizon import Band, HorizonReport, Recommendation
from tbptt.horizon.costs import Costs
from tbptt.report import Page, Strip, comparison_page, horizon_page, read_run, run_page

EVIL = '<script>alert("1")</script> & <b>%{x}</b> $x$ \'"'


def update(number: int, loss: Any, **others: Any) -> dict[str, Any]:
    return {
        "kind": "update",
        "update": number,
        "passes": 0,
        "position": 8 * number,
        "loss": loss,
        "terms": 16,
        "gradient_norm": 1.0 / number,
        "lookback": 8,
        "learning_rate": 0.01,
        "refused": 0,
    } | others


def lines_of(kind: str) -> list[dict[str, Any]]:
    """What a run of 40 updates would write; losses that are not finite among them."""
    numbers = range(1, 41)
    if kind == "metrics":
        unusual = {7: "nan", 8: "inf", 9: "-inf"}
        updates = [update(each, unusual.get(each, math.exp(-each / 20))) for each in numbers]
        updates[6] |= {"gradient_norm": "nan", "refused": 1}
        validations = [
            {"kind": "validation", "update": each, "loss": 2.0 / each, "accuracy": 0.5, EVIL: 1.0} for each in (20, 40)
        ]
        return [*updates, *validations]
    if kind == "timing":
        return [
            {
                "update": each,
                "elapsed_s": each / 4,
                "steps_per_s": 32.0,
                "lane_steps_per_s": 64.0,
                "peak_rss_bytes": 10**8,
            }
            for each in (10, 20, 30, 40)
        ]
    stability: list[dict[str, Any]] = [
        {
            "kind": "stability",
            "update": each,
            "steps": 4,
            "lookback": 8,
            "boundary_norms": [1.0, 0.5, "nan"][: 1 + each % 3],
            "state_norm": 0.3,
            "state_drift": None,
            "largest_update": "core.weight",
        }
        for each in numbers
    ]
    return [
        *stability,
        {"kind": "length", "update": 10, "k1": 4, "k2": 8, "needed_lookback": 6, "decay_rate": 0.5},
        {"kind": "lags", "update": 10, "lags": [1, 2, 4], "norms": [1.0, 0.5, 0.0], "needed_lookback": 3},
        {"kind": "lags", "update": 20, "lags": [1, 2, 4], "norms": None, "needed_lookback": None},
        {"kind": "alarm", "update": 8, "name": "non_finite", "message": EVIL, "fix": "lower <the> rate"},
        {"kind": "../" + EVIL, "update": 9, "nested": {"a": 1}},
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run, as the trainer writes it."""
    directory = tmp_path / "run"
    directory.mkdir()
    for kind in ("metrics", "timing", "stability"):
        text = "".join(json.dumps(line) + "\n" for line in lines_of(kind))
        (directory / f"{kind}.jsonl").write_text(text, encoding="utf-8")
    (directory / "config.toml").write_text("[run]\nupdates = 40\n[data]\nsource = '<script>'\n", encoding="utf-8")
    (directory / "run.json").write_text('{"version": "0.1.0"}', encoding="utf-8")
    return directory


def band(at: tuple[int, ...], values: list[float], spread: float = 0.1) -> Band:
    low, high = ([each * (1 + sign * spread) for each in values] for sign in (-1, 1))
    return Band(at, tuple(values), tuple(low), tuple(high))


@pytest.fixture
def horizon() -> HorizonReport:
    at, lags = (1, 2, 4, 8), tuple(range(1, 9))
    return HorizonReport(
        state=band(lags, [0.5**lag for lag in lags]),
        inputs=band(tuple(range(8)), [0.6**lag for lag in range(8)], 1.5),
        bias=band(at, [0.5, 0.2, math.nan, 0.0]),
        cosine=band(at, [0.5, 0.9, 0.99, 1.0]),
        signed=band(at, [-0.2, 1.2, 1.1, 1.0]),
        context=band(at, [2.0, 1.5, 1.2, 1.0]),
        costs=Costs(at, (0.1, 0.15, 0.2, 0.4), (100, 200, 400, 800), 2),
        lyapunov=-0.3,
        loss=1.0,
        learned=True,
        probes=3,
        lanes=2,
        max_lag=8,
        samples=np.array([[0.5**lag for lag in lags]] * 3),
        model=EVIL,
        notes=(f"a note of {EVIL}",),
    )


@pytest.fixture
def recommendation() -> Recommendation:
    return Recommendation(2, 5, 4, 3, None, 0.1, True, False, (f"Because of {EVIL}.",))


@pytest.fixture
def strips() -> list[Strip]:
    return [Strip("ab \n<&", [0.0, 0.1, 1.0, math.nan, 0.5, 0.2], "c", 0.25), Strip("\t\0é", [1.0, 0.0, 0.0], "<")]


@pytest.fixture
def comparison() -> Comparison:
    rows = (
        Row("a", "TBPTT(8, 8)", "biased", 0.2, 0.1, 0.3, 0.2, 0.0, 0.9, 0.8, 1.0, 8.0, 1e-5, 1e6, 100, 1.0, 1.1),
        Row(EVIL, "FullBPTT()", "exact", 0.0, 0.0, 0.01, 0.0, 0.0, 1.0, 1.0, 1.0, 64.0, 9e-5, 9e6, 20, 1.2, 1.3),
        Row("broken", "X()", "unbiased", failed=f"it raised {EVIL}"),
    )
    curve = Curve(
        [1, 2, 3], [8, 16, 24], [0.1, 0.2, 0.3], [2.0, math.nan, 1.0], [3], [24], [0.3], [1.1], {"acc": [0.5]}
    )
    return Comparison(rows, {"a": curve, EVIL: curve}, 4, 32, 64, (f"a note of {EVIL}",))


@pytest.fixture
def pages(
    run: Path,
    horizon: HorizonReport,
    recommendation: Recommendation,
    strips: list[Strip],
    comparison: Comparison,
) -> dict[str, Page]:
    return {
        "run": run_page(read_run(run)),
        "horizon": horizon_page(horizon, recommendation=recommendation, strips=strips),
        "comparison": comparison_page(comparison),
    }


@dataclass(frozen=True)
class Seen:
    dom: str
    errors: list[str]


Browser = Callable[..., Seen]


@pytest.fixture
def browse(tmp_path: Path) -> Browser:
    """Open a page in headless Chromium, where no name resolves; skipped where there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("there is no chromium")

    def open_(page: Path, *arguments: str, fragment: str = "") -> Seen:
        quiet = ["first-run", "default-browser-check"]
        off = ["gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage"]
        done = subprocess.run(
            [
                *(program, "--headless", "--no-sandbox", *(f"--no-{each}" for each in quiet)),
                *(f"--disable-{each}" for each in off),
                *("--enable-logging=stderr", "--v=0", "--host-resolver-rules=MAP * ~NOTFOUND"),
                *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=60000"),
                *(arguments or ("--dump-dom",)),
                f"{page.absolute().as_uri()}{fragment}",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return Seen(done.stdout, said)

    return open_
