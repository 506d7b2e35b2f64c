"""The layers of the house: imports point down, siblings do not know each other, importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from statistics import median

import pytest

import tbptt

ROOT = Path(tbptt.__file__).parent

# Lowest first. Rooms of one line are siblings: they do not import each other.
LAYERS = [
    {"errors"},
    {"opaque"},
    {"copies"},
    {"tree", "codec", "randomness", "side_state", "interrupts", "curve", "cost", "wrappers"},
    {"window", "torch_losses", "model", "weights", "length", "data", "recurrence", "pathways", "side_changes"},
    {"loss", "adapters", "rereading"},
    {"unroll", "coupling"},
    {"streams", "estimators", "models"},
    {"guards", "monitors", "metrics", "distributed"},
    {"checks", "checkpoint", "evaluate", "first_states", "snapshots"},
    {"update"},
    {"trainer", "comparison", "horizon", "online"},
    {"report", "integrations"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
NOT_IMPORTED = {"testing", "__init__", "__main__"}  # testing is for tests alone; the other two may see everything


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    """The rooms of this package that a module imports, wherever in it the import stands."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("tbptt.")}
    return {room for room in rooms if (ROOT / room).is_dir() or (ROOT / f"{room}.py").is_file()}


def faults(room: str, source: str) -> list[str]:
    allowed = {other for other in LEVEL if LEVEL[other] < LEVEL[room]} | {room}
    return [f"{room} imports {other}" for other in sorted(imported_rooms(source) - allowed)]


MODULES = sorted(path for path in ROOT.rglob("*.py") if room_of(path) not in NOT_IMPORTED)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert faults(room_of(path), path.read_text(encoding="utf-8")) == []


def test_the_test_sees_an_import_that_points_up() -> None:
    assert faults("streams", "from tbptt.trainer import Trainer") == ["streams imports trainer"]
    assert faults("streams", "def f():\n    import tbptt.estimators.base") == ["streams imports estimators"]
    assert faults("trainer", "from tbptt.streams.base import Stream") == []


def test_the_arbiters_share_no_code_with_what_they_judge() -> None:
    for path in (ROOT / "testing").rglob("*.py"):
        assert imported_rooms(path.read_text(encoding="utf-8")) <= {"testing"}


def test_importing_takes_nothing_optional_and_nothing_of_the_command_line() -> None:
    code = "import sys, tbptt; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    unwanted = {
        "lightning",
        "accelerate",
        "transformers",
        "tensorboard",
        "river",
        "datasets",
        "soundfile",
        "scipy",
        "pandas",
    }
    unwanted |= {"typer", "pydantic", "rich", "tomli_w", "plotly", "pyarrow", "tbptt.cli", "tbptt.testing"}
    assert unwanted.isdisjoint(loaded)


@pytest.mark.slow
def test_importing_costs_little_more_than_importing_torch() -> None:
    def seconds(module: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        return time.perf_counter() - begin

    seconds("tbptt")
    ratios = [seconds("tbptt") / seconds("torch") for _ in range(7)]
    assert median(ratios) < 1.3, ratios


def test_no_mutant_is_stale() -> None:
    """Each text that `scripts/mutants` replaces stands exactly once: else a mutant would no longer be tried."""
    loader = SourceFileLoader("mutants", str(ROOT.parents[1] / "scripts" / "mutants"))
    module = module_from_spec(spec_from_loader("mutants", loader))
    sys.modules["mutants"] = module  # its dataclass looks itself up
    loader.exec_module(module)
    counts = {each.name: (ROOT / each.file).read_text(encoding="utf-8").count(each.old) for each in module.MUTANTS}
    assert set(counts.values()) == {1}, {name: count for name, count in counts.items() if count != 1}
