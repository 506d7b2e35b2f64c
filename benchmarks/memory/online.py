"""A hundred thousand rows through `tbptt learn`: its memory on the way, and the same after a kill in the middle.

    python benchmarks/memory/online.py [--rows 100000]

Rows are piped in as fast as they are taken. Resident memory, and its peak, are read from the kernel (Linux) when so
many predictions have come out. Then the same rows are learned from again, with a checkpoint every 10 000 rows, killed
by SIGKILL after 54 321 predictions and resumed: the file of predictions must be the undisturbed one, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import save

KILLED_AFTER = 54_321
OPTIONS = ["--target", "y", "--hidden", "32", "--k1", "8", "--k2", "24"]


def write_rows(path: Path, rows: int) -> None:
    """Two inputs; the label hangs on both, and on the row before."""
    drawn = np.random.default_rng(0)
    a = drawn.normal(size=rows)
    b = np.sin(np.arange(rows) / 7) + 0.1 * drawn.normal(size=rows)
    y = 20.0 + 3.0 * np.concatenate([[0.0], a[:-1]]) + b
    lines = [f"{p:.6f},{q:.6f},{r:.6f}\n" for p, q, r in zip(a, b, y, strict=True)]
    path.write_text("a,b,y\n" + "".join(lines))


def start(*words: str, **options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tbptt", "learn", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, **options)  # pyright: ignore


def memory(pid: int) -> dict[str, float]:
    """Resident memory now, and its peak, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1000 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"now": found["VmRSS"], "peak": found["VmHWM"]}


def undisturbed(path: Path, marks: list[int]) -> tuple[bytes, dict[int, dict[str, float]], float]:
    said: list[bytes] = []
    seen: dict[int, dict[str, float]] = {}
    begin = time.perf_counter()
    with start("--input", "csv:-", *OPTIONS, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        feeding = threading.Thread(target=lambda: (process.stdin.write(path.read_bytes()), process.stdin.flush()))
        feeding.start()
        for line in process.stdout:
            said.append(line)
            if len(said) in marks:
                seen[len(said)] = memory(process.pid)
            if len(said) == marks[-1]:
                feeding.join()
                process.stdin.close()
    return b"".join(said), seen, time.perf_counter() - begin


def killed(path: Path, directory: Path) -> bytes:
    said = directory / "said.txt"
    options = ["--input", f"csv:{path}", *OPTIONS, "--out", str(directory / "run"), "--predictions", str(said)]
    with start(*options) as process:
        while not said.exists() or said.read_bytes().count(b"\n") < KILLED_AFTER:
            time.sleep(0.2)
        process.kill()
    assert said.read_bytes().count(b"\n") < 100_000, "it was over before it was killed"
    with start(*options, "--resume") as process:
        assert process.wait() == 0
    return said.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args().rows
    marks = sorted({1000, 10_000, 20_000, 50_000, rows})
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "rows.csv"
        write_rows(path, rows)
        whole, seen, seconds = undisturbed(path, marks)
        again = killed(path, Path(place))
    figures = {f"{kind} MB after {mark} rows": seen[mark][kind] for mark in marks for kind in ("now", "peak")}
    figures |= {
        "peak MB, last / after 10000 rows": seen[rows]["peak"] / seen[10_000]["peak"],
        "killed after": KILLED_AFTER,
        "predictions of the killed and resumed run are the undisturbed one's": whole == again,
        "rows a second": rows / seconds,
    }
    save("memory_online", figures, {"peak_mb": [seen[mark]["peak"] for mark in marks]}, rows=rows, marks=marks)


if __name__ == "__main__":
    main()
