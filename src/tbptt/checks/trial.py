"""The experiments of `tbptt.check`, each a question with a measured answer.

Letters: T time, B lanes.
"""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from tbptt.checks.reach import measure_reach
from tbptt.checks.report import CheckItem
from tbptt.errors import ShapeError, TbpttError
from tbptt.estimators.base import Estimator
from tbptt.model import find_lane_dims, trainable_parameters
from tbptt.tree import LaneDims, Tree, as_leaves, clone, detach, differentiable, tensors, time_cat, to, tree_map
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = ["Trial"]

MAX_STEPS, MAX_LANES = 24, 4
"""What of the example is used: enough to see every fault, little enough to take a second."""
REACH_BUDGET = 40_000
"""The most model steps that measuring the reach may take before it is left out, and said so."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A copy of the model, an example, and the experiments.

    Args:
        model: the copy; in double precision where the model allows that.
        window: the example; its inputs only.
        dims: the lane dimensions of the state.
        tolerance: the relative difference below which two results count as one.
    """

    model: nn.Module
    window: Window
    dims: LaneDims | None
    tolerance: float

    @staticmethod
    def prepare(model: nn.Module, example: Window) -> Trial:
        """Make a trial of `model`, which stays untouched.

        Raises:
            ShapeError: the example has fewer than three steps.
        """
        if example.steps < 3:
            raise ShapeError(
                f"an example of at least 3 steps was expected, but {example.steps} came: "
                "one pass could not be compared with chunks of it",
                fix="tbptt.check(model, torch.randn(24, 4, features))",
            )
        inputs = tree_map(lambda leaf: leaf[:MAX_STEPS, :MAX_LANES], example.inputs)
        device = next(model.parameters()).device
        twin, inputs, tolerance = _in_double(copy.deepcopy(model), to(inputs, device))
        return Trial(twin, Window(inputs), find_lane_dims(twin, inputs), tolerance)

    def state(self) -> CheckItem:
        """Ask whether it returns a state at all."""
        with self._mode(train=False), torch.no_grad():
            _, state = self._run(self.window, None)
        name = "state"
        if not differentiable(state):
            cause = "it returns no state: every window would start from nothing"
            return CheckItem(name, False, "none", cause, "return outputs, state")
        dims = self.dims or ("?",) * len(tensors(state))
        shapes = [f"{tuple(leaf.shape)}, lanes in {dim}" for leaf, dim in zip(tensors(state), dims, strict=True)]
        return CheckItem(name, True, "; ".join(shapes))

    def value_carry(self) -> CheckItem:
        """Compare the outputs of one pass with those of chunks."""
        name = "value carry"
        with self._mode(train=False), torch.no_grad():
            whole, again = self._run(self.window, None)[0], self._run(self.window, None)[0]
            noise = _apart(whole, again)
            apart = {label: _apart(whole, self._chunks(plan)) for label, plan in self._plans().items()}
            chunks = self._chunks(self._plans()["chunks"])
            forgets = _apart(chunks, self._chunks(self._plans()["chunks"], forget=True)) <= self.tolerance
        if noise > self.tolerance:
            cause = "its outputs are random even in eval mode"
            return CheckItem(name, False, _row({"twice": noise}), cause, "draw nothing unless self.training")
        if max(apart.values()) <= self.tolerance:
            return CheckItem(name, True, _row(apart))
        cause = "its outputs depend on where the sequence is cut: the state does not hold all that is needed"
        if forgets:
            cause = "it forgets to pass its state on: each chunk is computed as if it were a fresh start"
        return CheckItem(name, False, _row(apart), cause, "outputs, state = self.core(inputs, state)")

    def gradient_carry(self) -> CheckItem:
        """Compare the gradient of the last chunk's outputs in one pass with that through chunks."""
        name, plans = "gradient carry", self._plans()
        with self._mode(train=False):
            begin = self.window.steps - plans["chunks"][-1]
            wanted = self._gradient(self._run(self.window, None)[0], begin)
            apart = {
                label: _distance(wanted, self._gradient(self._chunks(plan), begin)) for label, plan in plans.items()
            }
            through = self._gradient(self._chunks(plans["chunks"]), begin)
            detached = self._gradient(self._chunks(plans["chunks"], cut=True), begin)
        fix = "return the state itself, not state.detach(): the library cuts the graph where it has to"
        apart_cut = _distance(wanted, detached)
        if apart_cut <= self.tolerance:
            cause = "no gradient comes from before the chunk, in one pass neither: it detaches its state inside"
            return CheckItem(name, False, _row({"past against no past": apart_cut}), cause, fix)
        if max(apart.values()) <= self.tolerance:
            return CheckItem(name, True, _row(apart))
        cause = "its gradient depends on where the sequence is cut"
        if _distance(detached, through) <= self.tolerance:
            cause = "it detaches the state that it takes or returns: no gradient crosses a boundary"
        return CheckItem(name, False, _row(apart), cause, fix)

    def in_place(self) -> CheckItem:
        """Run two chunks before one backward pass, as a look-back over several windows does."""
        name, detail = "in-place safety", "two chunks, then both backward"
        half = self.window.steps // 2
        with self._mode(train=True):
            outputs, state = self._run(self.window[:half], None)
            given = as_leaves(state)
            before = clone(given)
            later, _ = self._run(self.window[half:], given)
            try:
                for each in (outputs, later):
                    torch.autograd.grad(_project(each, 0), list(self._parameters()), allow_unused=True)
            except RuntimeError as error:
                cause = f"it overwrites what the backward pass needs: {str(error).splitlines()[0]}"
                return CheckItem(name, False, detail, cause, "state = f(state), not state.copy_(f(state))")
        if all(torch.equal(a, b) for a, b in zip(tensors(before), tensors(given), strict=True)):
            return CheckItem(name, True, detail)
        cause = "it writes into the state that it is given, which others still need"
        return CheckItem(name, False, detail, cause, "state = state + x, not state += x")

    def lane_independence(self) -> CheckItem:
        """Change the inputs of lane 0 and look at the others."""
        name = "lane independence"
        if self.window.lanes == 1:
            return CheckItem(name, True, "one lane in the example: nothing to mix")
        other = tree_map(_disturb_lane_0, self.window.inputs)
        apart: dict[str, float] = {}
        for label, train in (("eval", False), ("train", True)):
            results: list[list[Tensor]] = []
            for inputs in (self.window.inputs, other):
                with self._mode(train=train), torch.no_grad():
                    torch.manual_seed(0)  # the same dropout in both
                    results.append(self._other_lanes(*self._run(Window(inputs), None)))
            apart[label] = _apart(*results)
        cause = "it mixes lanes: when lane 0 is fed something else, the other lanes change"
        if max(apart.values()) <= self.tolerance:
            return CheckItem(name, True, _row(apart))
        return CheckItem(name, False, _row(apart), cause, "compute each lane alone: no mean or norm over dimension 1")

    def reset(self) -> CheckItem:
        """Reset lane 0 in the middle and compare it with a fresh start there."""
        name, middle = "reset", self.window.steps // 2
        shared = self.dims is None or None in self.dims
        if shared and self.window.lanes > 1:
            return CheckItem(name, True, "all lanes together only: part of the state has no lane dimension")
        flags = torch.zeros_like(self.window.reset)
        flags[middle, 0] = True
        with self._mode(train=False), torch.no_grad():
            whole, _ = self._run(self.window, None)
            fresh, _ = self._run(self.window[middle:], None)
            cut, _ = unroll(self.model, Window(self.window.inputs, reset=flags), None, self.dims)
        lane = _apart(tree_map(lambda leaf: leaf[middle:, :1], cut), tree_map(lambda leaf: leaf[:, :1], fresh))
        others = _apart(tree_map(lambda leaf: leaf[:, 1:], cut), tree_map(lambda leaf: leaf[:, 1:], whole))
        apart = {"reset lane": lane, "others": others}
        if max(apart.values()) <= self.tolerance:
            return CheckItem(name, True, _row(apart))
        cause = "a lane that is reset does not restart: state=None means something else than zeros to the model"
        return CheckItem(name, False, _row(apart), cause, "def initial_state(self, lanes): return the first state")

    def reach(self, estimator: Estimator) -> CheckItem:
        """Measure how far the gradients of `estimator` go with this model."""
        name = "reach"
        steps = estimator.next_steps(estimator.init(self.model, 1))
        asked = estimator.reach(steps)
        longest = max(asked)
        if (longest // steps + 3) * (longest + steps) > REACH_BUDGET:
            return CheckItem(name, True, f"not measured here: {longest} steps back would take minutes")
        one_lane = tree_map(lambda leaf: leaf[:, :1], self.window.inputs)
        injected = [step for step, each in enumerate(asked) if each]
        found = measure_reach(self.model, one_lane, estimator, sorted({injected[0], injected[-1]}))
        detail = "; ".join(f"{each.asked} steps asked, {each.measured} measured" for each in found)
        if all(each.agrees for each in found):
            short = any(each.model < each.asked for each in found)
            return CheckItem(name, True, detail + (" (the model itself sends back no more)" if short else ""))
        cause = "the gradient does not reach as far as the estimator says"
        return CheckItem(name, False, detail, cause, "use another estimator, and report this one")

    def _parameters(self) -> list[Tensor]:
        return list(trainable_parameters(self.model).values())

    def _plans(self) -> dict[str, list[int]]:
        steps = self.window.steps
        third = steps // 3
        rest = steps - 2 * third
        return {"chunks": [third, third, rest], "uneven": [third + 1, third, rest - 1], "steps": [1] * steps}

    def _run(self, window: Window, state: Tree | None) -> tuple[Tree, Tree]:
        return unroll(self.model, window, state, None)

    def _chunks(self, sizes: list[int], *, forget: bool = False, cut: bool = False) -> Tree:
        state, pieces = None, []
        for begin, end in pairwise([0, *accumulate(size for size in sizes if size)]):
            outputs, state = self._run(self.window[begin:end], None if forget else state)
            state = detach(state) if cut else state
            pieces.append(outputs)
        return time_cat(pieces)

    def _gradient(self, outputs: Tree, begin: int) -> list[Tensor]:
        return list(torch.autograd.grad(_project(outputs, begin), self._parameters(), materialize_grads=True))

    def _other_lanes(self, outputs: Tree, state: Tree) -> list[Tensor]:
        kept = [leaf[:, 1:] for leaf in tensors(outputs)]
        for leaf, dim in zip(tensors(state), self.dims or (), strict=False):
            kept += [] if dim is None else [leaf.narrow(dim, 1, leaf.shape[dim] - 1)]
        return kept

    @contextmanager
    def _mode(self, *, train: bool) -> Generator[None]:
        """Put the copy into a mode; afterwards its buffers (running statistics, say) are as before."""
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        self.model.train(train)
        try:
            yield
        finally:
            for name, value in self.model.named_buffers():
                value.copy_(buffers[name])


def _in_double(model: nn.Module, inputs: Tree) -> tuple[nn.Module, Tree, float]:
    """Return model, inputs and tolerance: in double precision if the model can be run so."""
    if any(value.dtype not in (torch.float32, torch.float64) for value in model.parameters()):
        return model, inputs, 1e-2
    try:
        doubled = copy.deepcopy(model).double()
        wide = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, inputs)
        with torch.no_grad():
            unroll(doubled, Window(wide)[:1], None, None)
    except (RuntimeError, TypeError, TbpttError):  # it fixes a dtype inside, or the device has no float64
        return model, inputs, 1e-4
    return copy.deepcopy(model).double(), wide, 1e-8


def _disturb_lane_0(leaf: Tensor) -> Tensor:
    """Return inputs in which lane 0 is fed its own past in reverse, and twice as large if it has a size."""
    other = leaf.clone()
    other[:, 0] = leaf[:, 0].flip(0) * 2 + 1 if leaf.is_floating_point() else leaf[:, 0].flip(0)
    return other


def _project(outputs: Tree, begin: int) -> Tensor:
    """Return a random direction of the outputs from step `begin` on, 0-dim."""
    generator = torch.Generator().manual_seed(0)
    total: list[Tensor] = []
    for leaf in differentiable(outputs):
        rest = leaf[begin:]
        total.append((rest * torch.randn(rest.shape, generator=generator, dtype=torch.float64).to(rest)).sum().real)
    return torch.stack(total).sum()


def _apart(left: Tree, right: Tree) -> float:
    """Return the largest difference of two trees, relative to the size of the left one."""
    worst = 0.0
    for a, b in zip(tensors(left), tensors(right), strict=True):
        if a.shape != b.shape:
            raise ShapeError(f"outputs of shape {tuple(a.shape)} were expected, but {tuple(b.shape)} came")
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)))
    return worst


def _distance(wanted: list[Tensor], found: list[Tensor]) -> float:
    """Return the distance of two gradients, relative to the length of the wanted one."""
    length = torch.nn.utils.get_total_norm(wanted).clamp(min=1e-30)
    return float(torch.nn.utils.get_total_norm([a - b for a, b in zip(wanted, found, strict=True)]) / length)


def _row(values: dict[str, float]) -> str:
    return ", ".join(f"{label} {value:.0e}" for label, value in values.items())
