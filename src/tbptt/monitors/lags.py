"""How far back the gradient goes, as training goes: its norm by lag, as JSON lines.

Letters: T time, B lanes, K lags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from tbptt.curve import dense, lag_grid, needed_lookback
from tbptt.errors import ConfigError, EndOfStream
from tbptt.estimators.carry import unit_of
from tbptt.estimators.probe import SPREAD, run_chain, spread
from tbptt.estimators.segments import lane_norms, walk_back
from tbptt.loss import Loss, StepLoss
from tbptt.model import find_lane_dims
from tbptt.monitors.base import Monitor, Plan, Update
from tbptt.monitors.lines import Lines, check_every, json_number
from tbptt.pathways import in_segments
from tbptt.side_state import preserved
from tbptt.streams.base import Stream
from tbptt.window import Window

__all__ = ["LagCurves"]

_TOLERANCE = 0.1
"""The relative bias that `needed_lookback` allows, as `Adaptive` does where nothing else is said."""


class LagCurves(Monitor):
    """Measure, every so many updates, how the gradient of a loss decays on its way back.

    For seeing the horizon open as a model learns to look back, and close when it forgets how, whatever k1 and k2 are:
    a short curve at the start is that of a model that has learned nothing yet. A line has

        kind ("lags"), update, lags (in steps), norms (of the gradient of the losses of one step, drawn among the last
        16 of a piece of the stream, each with respect to its lane's state so many steps before; mean over the lanes
        that have a target there), needed_lookback (at a tolerance of 0.1; see `tbptt.curve.needed_lookback`; null when
        it is beyond max_lag, or nothing arrives)

    Where the state's lanes are not known they are taken together. norms is null where these steps had no target. One
    step is a noisy measure: look at several lines. Each piece begins from the model's initial state and warms up over
    max_lag steps or more; the next line's begins where it ends, from the start of the stream again at the end of a
    pass. The model is run in the mode that it is in. Neither it nor its buffers, its mode or any random generator is
    changed. A killed and resumed run's file is that of one which never stopped.

    Args:
        model: the model that is trained.
        loss: as for training.
        stream: held out, or a second instance; never the one that is trained on, whose place would be moved.
        path: the file. A run that starts at update 0 empties it; one that resumes cuts it back to where its
            checkpoint was taken.
        every: updates to a line, 1 or more: there is one at each update whose number is a multiple.
        max_lag: the longest lag, steps; a pass of the stream must have 2 max_lag + 16. With a model of segments it is a
            multiple of them, and so are all lags, counted from the end of the loss's segment.

    Raises:
        ConfigError: `every` or `max_lag` cannot be meant.

    Exactness: exact at each lag, with today's weights (tests/monitors/test_lags.py).
    Cost: for each line 2 max_lag steps forward and max_lag back, the latter in as many pieces as there are lags, about
        30; memory of max_lag steps.

    Example:
        >>> from tbptt.streams import ArrayStream
        >>> held_out = ArrayStream(torch.randn(160, 1), torch.randn(160, 1), lanes=2)
        >>> LagCurves(nn.GRU(1, 1), nn.MSELoss(), held_out, "runs/a/lags.jsonl", every=500, max_lag=32).steps
        80
    """

    def __init__(
        self, model: nn.Module, loss: Loss, stream: Stream, path: str | Path, *, every: int = 1000, max_lag: int = 128
    ) -> None:
        longest = cast(object, max_lag)  # whatever a caller without a type checker gave
        if not isinstance(longest, int) or isinstance(longest, bool) or longest < 1:
            raise ConfigError(
                f"max_lag was expected to be a whole number of steps, 1 or more, but is {longest!r}: there would be "
                "no lag to measure at",
                fix="LagCurves(..., max_lag=128)",
            )
        self._unit = unit_of(model, max_lag=longest)
        self.path = Path(path)
        self.every = check_every(every, "LagCurves(..., every=1000)")
        self.max_lag = longest
        self.model, self.loss, self.stream = model, StepLoss.of(loss), stream
        self._lines = Lines(path)

    @property
    def steps(self) -> int:
        """The steps of one piece of the stream."""
        return 2 * self.max_lag + spread(self._unit)

    def begin(self, plan: Plan) -> None:
        """Open the file: emptied for a new run, cut back for a resumed one.

        Raises:
            ConfigError: a pass of the stream is too short.
        """
        place = self.stream.state_dict()
        self._read()
        self.stream.load_state_dict(self._lines.begin(plan).get("stream", place))

    def update(self, update: Update) -> None:
        """Measure, and write a line, if it is time."""
        if update.number % self.every:
            return
        lags, needed = [self._unit * lag for lag in lag_grid(self.max_lag // self._unit)], None
        norms = self._norms(self._read(), lags, np.random.default_rng(update.number))
        if norms is not None and np.isfinite(norms).all():
            needed = needed_lookback(dense(lags, norms), _TOLERANCE)
        self._lines.write(
            {
                "kind": "lags",
                "update": update.number,
                "lags": lags,
                "norms": None if norms is None else [json_number(norm) for norm in norms],
                "needed_lookback": needed,
            }
        )

    def end(self) -> None:
        """Write what is left and close the file."""
        self._lines.end(self._remembered())

    def state_dict(self) -> dict[str, Any]:
        """Make the file durable, and return its length and the place in the stream.

        Raises:
            CheckpointError: the disk did not take the lines; they are kept and tried again.
        """
        return self._lines.state_dict(self._remembered())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cut the file back to where `state` was taken, now or once it is open."""
        self._lines.load_state_dict(state)
        self.stream.load_state_dict(state["stream"])

    def _remembered(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict()}

    def _read(self) -> Window:
        """Return the next piece of the stream; what is left of a pass and too short is left out."""
        try:
            window = self.stream.read(self.steps)
        except EndOfStream:
            window = None
        if window is None or window.steps < self.steps:
            self.stream.rewind()
            window = self.stream.read(self.steps)
        if window.steps < self.steps:
            longest = (window.steps - spread(self._unit)) // 2 // self._unit * self._unit
            raise ConfigError(
                f"a stream of at least {self.steps} steps a pass was expected, to warm up over {self.max_lag} and go "
                f"back over as many, but it has {window.steps}: the longest lags could not be measured",
                fix=f"LagCurves(..., max_lag={longest})" if longest > 0 else "another stream, with fewer lanes",
            )
        return window.to(next(self.model.parameters()).device)

    def _norms(self, window: Window, lags: Sequence[int], draws: np.random.Generator) -> list[float] | None:
        """Send the losses of one step back; None where there is none."""
        valid, _ = self.loss.valid(window)
        candidates = [step for step in range(window.steps - SPREAD, window.steps) if bool(valid[step].any())]
        if not candidates:
            return None
        last = int(draws.choice(candidates))
        dims = find_lane_dims(self.model, window.inputs)
        mask = torch.zeros_like(window.mask)
        mask[last] = valid[last]
        piece = replace(window, mask=mask)[: in_segments(last + 1, self._unit)]
        norms: list[float] = []
        with preserved(self.model, device=mask.device), torch.enable_grad():
            cuts = [piece.steps - lag for lag in lags]
            chain, _ = run_chain(self.model, self.loss, None, piece, dims, cuts)
            loss = chain[-1].loss
            assert loss is not None
            for step in walk_back(chain, [[]] * len(chain), torch.ones_like(loss), to_start=True):
                by_lane = lane_norms(step.cotangent, chain[step.index].start, dims)
                lanes = 1 if len(by_lane) == 1 else int(valid[last].sum())  # of the others nothing is in the sum
                norms.append(float(by_lane.sum()) / lanes)
        return norms
