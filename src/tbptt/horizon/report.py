"""What was measured of a horizon."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tbptt.curve import Floats, decay_rate, dense, relative_bound
from tbptt.errors import ConfigError
from tbptt.horizon.costs import Costs
from tbptt.horizon.fresh import diverged, has_diverged
from tbptt.horizon.recommend import Limits, Recommendation, check_tolerance, choose, need
from tbptt.horizon.statistics import Band
from tbptt.horizon.ways import Way

__all__ = ["HorizonReport"]


@dataclass(frozen=True, eq=False)
class HorizonReport:
    """How far back the gradients of a model go on a stream.

    Args:
        state: norm of the gradient with respect to the state, by lag.
        inputs: norm of the gradient with respect to the input (or what an embedding makes of it), by lag from 0; None
            where a model has nothing of the kind.
        bias: relative bias of the parameters' gradient by look-back, against the longest; nan where the expected
            gradient does not stand out of the noise. None when it was not asked for.
        cosine: of the two, likewise.
        signed: the signed share of the longest's gradient that a look-back has, likewise; below 0 it points the
            wrong way.
        context: loss by the steps of context that the model sees, from its initial state; None if not asked for.
        costs: of an update by look-back; None if not asked for.
        lyapunov: the largest exponent, a step; None where it was not measured.
        loss: mean of the probes.
        learned: whether the model's loss is lower with its past than with one step of context; None if not asked for.
        probes: losses sent back, each in all lanes.
        lanes: sequences side by side.
        max_lag: the longest lag, steps.
        samples: the state's norms, one curve a probe.
        model: its class.
        notes: what a reader should know.
        fresh_loss: the same of a copy with fresh weights; nan where not all of its modules can draw them.
        resolution: steps between two lags; of a segment where the model has segments.
        pathways: the gradient told apart by the ways in which it goes back, by name; empty for a model with one.
        single: of each probe, the squared norm of what each look-back leaves out of its parameters' gradient, and last
            that of all of it; None where parameters' gradients were not compared.
    """

    state: Band
    inputs: Band | None
    bias: Band | None
    cosine: Band | None
    signed: Band | None
    context: Band | None
    costs: Costs | None
    lyapunov: float | None
    loss: float
    learned: bool | None
    probes: int
    lanes: int
    max_lag: int
    samples: Floats
    model: str
    notes: tuple[str, ...]
    fresh_loss: float = math.nan
    resolution: int = 1
    pathways: Mapping[str, Way] = field(default_factory=dict[str, Way])
    single: Floats | None = None

    @property
    def has_diverged(self) -> bool:
        """Whether the loss is more than three times that of fresh weights: gradients of such a model say nothing."""
        return has_diverged(self.loss, self.fresh_loss)

    @property
    def lookbacks(self) -> tuple[int, ...]:
        """The look-backs that were compared, steps."""
        for each in (self.bias, self.context, self.costs):
            if each is not None:
                return each.lookbacks if isinstance(each, Costs) else each.at
        return self.state.at

    @property
    def decay_rate(self) -> float:
        """What the state's gradient is multiplied by from one lag to the next, in the long run; see `tbptt.curve`."""
        return decay_rate(self._phi)

    @property
    def half_life(self) -> float:
        """Steps in which it halves, at that rate; infinite when it does not fall."""
        rate = self.decay_rate
        return 0.0 if rate == 0 else math.log(2) / -math.log(rate) if rate < 1 else math.inf

    @property
    def cut_off(self) -> Band:
        """A bound of the share of the gradient that a look-back cuts off, by look-back; infinite: nothing is known."""
        bound = relative_bound(self._phi)
        values = tuple(float(bound[steps]) for steps in self.lookbacks)
        return Band(self.lookbacks, values, values, values)

    @property
    def _phi(self) -> Floats:
        return dense(self.state.at, self.state.mean)

    def lag_of_share(self, share: float, pathway: str | None = None) -> int:
        """Return within how many steps that share of the measured gradient mass lies, the loss's own included.

        Args:
            share: above 0 and up to 1.
            pathway: of what comes through this one alone; left out: of all.

        Raises:
            ConfigError: another share, or a pathway that was not told apart.
        """
        if not 0 < share <= 1:
            raise ConfigError(f"a share above 0 and up to 1 was expected, but {share!r} came", fix="0.9")
        mass = (self._phi if pathway is None else self._alone(pathway))[:-1].cumsum()
        return int((mass < share * mass[-1] * (1 - 1e-12)).sum()) + 1

    def share_of(self, pathway: str) -> float:
        """Return which share of what crosses from step to step, or segment to segment, is this pathway's; 0 to 1.

        Of the norms, summed over lags, of each pathway's part of the state's gradient.

        Raises:
            ConfigError: a pathway that was not told apart.
        """
        self._alone(pathway)
        crossing = {name: dense(each.crossing.at, each.crossing.mean).sum() for name, each in self.pathways.items()}
        total = sum(crossing.values())
        return float(crossing[pathway] / total) if total else 0.0

    def _alone(self, pathway: str) -> Floats:
        if pathway not in self.pathways:
            raise ConfigError(
                f"one of the pathways told apart was expected, {', '.join(self.pathways) or 'of which there are none'},"
                f" but {pathway!r} came",
                fix="report.pathways has their names; a model says them by def pathways(self, state)",
            )
        alone = self.pathways[pathway].alone
        return dense(alone.at, alone.mean)

    def recommend(
        self,
        tolerance: float = 0.1,
        *,
        k1: int | None = None,
        memory: float | None = None,
        time: float | None = None,
    ) -> Recommendation:
        """Return a k1 and a k2 whose gradient is biased by less than `tolerance`, and why.

        The look-back that is needed is the longest of four: the shortest that cuts off less than the tolerance of
        the state's gradient, in norm; the shortest that leaves out less of the parameters' gradient of single losses,
        for weights that act at the far end of a delay; the shortest from which on no longer one is shown to have a more
        biased mean gradient, for systems whose near and far influences cancel; and the shortest context with
        which the model has all but the tolerance of what its past is worth to its loss, for memories that are
        saturated, which are used and yet let no gradient through. Where a trained model's expected gradient is lost
        in the noise, its relative bias means nothing, and the context alone decides. A model that has diverged is
        refused: its gradients are of a function that nobody wants.

        Args:
            tolerance: relative bias to allow, above 0 and below 1.
            k1: steps between updates, if they are given; left out: half of what is needed.
            memory: bytes that autograd may hold.
            time: seconds that a step of the stream may take, forward and back.

        Raises:
            ConfigError: a tolerance that cannot be meant; limits without measured costs; a model that has diverged; or
                a curve that is too short to say.
        """
        check_tolerance(tolerance)
        limits = Limits(k1, memory, time)
        if self.has_diverged:
            raise ConfigError(
                f"a model that learns was expected, but {diverged(self.loss, self.fresh_loss)}: any k2 would be a "
                "guess",
                fix="weights from before it diverged, and a lower learning rate from there",
            )
        context = self.context if self.learned else None
        trained = not self.loss >= self.fresh_loss  # also where that is nan
        needed = need(
            self.state.at, self.samples, self.bias, context, self.loss, tolerance, trained=trained, single=self.single
        )
        return choose(needed, self.costs, limits, tolerance, self.learned, self.resolution)

    def tables(self) -> dict[str, dict[str, list[Any]]]:
        """Return all numbers as tables: by name, columns by name."""
        lags = {**_columns("gradient_of_state", "lag", self.state)}
        tables = {"lags": lags}
        if self.inputs is not None:
            tables["input_lags"] = _columns("gradient_of_input", "lag", self.inputs)
        for name, way in self.pathways.items():
            tables |= _of_way(name, way)
        rows: dict[str, list[Any]] = {"lookback": list(self.lookbacks), "cut_off": list(self.cut_off.mean)}
        for name, each in (
            ("bias", self.bias),
            ("cosine", self.cosine),
            ("signed", self.signed),
            ("loss", self.context),
        ):
            if each is not None:
                rows |= {key: value for key, value in _columns(name, "lookback", each).items() if key != "lookback"}
        if self.costs is not None:
            rows["seconds"] = list(self.costs.seconds)
            rows["held_bytes"] = list(self.costs.held_bytes)
        tables["lookbacks"] = rows
        return tables

    def to_json(self) -> str:
        """Return everything as one JSON object; not a number is null, infinite is a string."""
        about = {
            "model": self.model,
            "loss": self.loss,
            "fresh_loss": self.fresh_loss,
            "probes": self.probes,
            "lanes": self.lanes,
            "max_lag": self.max_lag,
            "decay_rate": self.decay_rate,
            "half_life": self.half_life,
            "lyapunov": self.lyapunov,
            "resolution": self.resolution,
            "shares": {name: self.share_of(name) for name in self.pathways},
            "learned": self.learned,
            "notes": list(self.notes),
        }
        return json.dumps(_plain(about | {"tables": self.tables()}), allow_nan=False)

    def __str__(self) -> str:
        lines = [
            f"How far back {self.model} looks: {self.probes} losses in {self.lanes} lane"
            f"{'s' if self.lanes > 1 else ''}, each sent {self.max_lag} steps back",
            f"  mass      50 % of the gradient within {self.lag_of_share(0.5)} steps, 90 % within "
            f"{self.lag_of_share(0.9)}, 99 % within {self.lag_of_share(0.99)}",
            f"  decay     by {self.decay_rate:.4g} a step at last, half-life {self.half_life:.3g} steps",
        ]
        if self.lyapunov is not None:
            lines.append(f"  Lyapunov  {self.lyapunov:+.4g} a step: {_of_exponent(self.lyapunov)}")
        if self.resolution > 1:
            lines.append(f"  segments  of {self.resolution} steps, at whose ends alone the model can be cut")
        for name in self.pathways:
            within = ", ".join(f"{share * 100:g} % within {self.lag_of_share(share, name)}" for share in (0.5, 0.9))
            lines.append(f"  through   {name}: {self.share_of(name):.0%} of what crosses; alone {within} steps")
        lines += ["", *_as_text(_head(self)), *(f"  note: {note}" for note in self.notes)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def _of_exponent(exponent: float) -> str:
    if exponent > 0:
        return "chaotic here, gradients grow with the lag"
    return "nearby states meet, gradients vanish in the long run"


def _columns(name: str, at: str, band: Band) -> dict[str, list[Any]]:
    return {at: list(band.at), name: list(band.mean), f"{name}_low": list(band.low), f"{name}_high": list(band.high)}


def _of_way(name: str, way: Way) -> dict[str, dict[str, list[Any]]]:
    """Return the tables of one way: by lag of the state, and of the input."""
    crossing, alone = _columns("crossing", "lag", way.crossing), _columns("alone", "lag", way.alone)
    tables = {f"{name}_lags": crossing | alone}
    if way.inputs is not None:
        tables[f"{name}_input_lags"] = _columns("alone", "lag", way.inputs)
    return tables


def _head(report: HorizonReport) -> list[list[str]]:
    rows = [["look-back", "cut off", "bias", "95 %", "cosine", "loss with so much context", "ms", "MB"]]
    for index, steps in enumerate(report.lookbacks):
        row = [str(steps), f"{report.cut_off.mean[index]:.3g}"]
        if report.bias is not None and report.cosine is not None and not math.isnan(report.bias.mean[0]):
            low, high = report.bias.low[index], report.bias.high[index]
            row += [f"{report.bias.mean[index]:.3g}", f"{low:.2g}..{high:.2g}", f"{report.cosine.mean[index]:.3f}"]
        else:
            row += ["", "", ""]
        row.append(f"{report.context.mean[index]:.4g}" if report.context is not None else "")
        costs = report.costs
        row += (
            ["", ""] if costs is None else [f"{costs.seconds[index] * 1e3:.3g}", f"{costs.held_bytes[index] / 1e6:.3g}"]
        )
        rows.append(row)
    return rows


def _as_text(rows: Sequence[Sequence[str]]) -> list[str]:
    used = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in used}
    return ["  " + "  ".join(row[column].rjust(widths[column]) for column in used) for row in rows]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
