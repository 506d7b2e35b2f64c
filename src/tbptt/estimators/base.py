"""What every estimator takes and gives.

Letters: B lanes, K boundaries crossed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from tbptt.loss import Loss
from tbptt.model import named_parameters
from tbptt.rereading import Readable
from tbptt.tree import Tree
from tbptt.window import Window

__all__ = ["Carry", "Estimate", "Estimator"]


@dataclass(frozen=True, eq=False)
class Estimate:
    """One update's gradient estimate, and what was seen on the way.

    Args:
        outputs: the model's outputs for this window, detached; None unless the estimator keeps them.
        loss: sum / count of the window's reported losses, 0-dim; NaN when it had no target.
        loss_sum: the sum of the reported losses, 0-dim.
        num_terms: the number of reported losses.
        gradients: of sum / count over the *injected* losses, keyed as `model.named_parameters()`; zeros for
            a parameter that no injected loss depends on. Owned by the estimate. Where the count is random, of sum /
            `denominator`.
        lookback: the number of steps the newest injected loss was back-propagated through.
        boundary_norms: norm of the gradient with respect to the state at each boundary crossed, newest
            first. Shape (K,).
        num_injected: the number of losses injected; with none there is nothing to learn from this window.
        metrics: whatever else the estimator or a guard has measured.
        rate_factor: what the learning rate of this one update is to be multiplied by; see `tbptt.scaled_rate`. 1 but
            for lengths that change and say so.
        denominator: what the gradients of the summed losses were divided by; None: `num_injected`. Another one where
            that number is random and hangs together with the sum, as the mean of such ratios is not the ratio of means.
    """

    outputs: Tree | None
    loss: Tensor
    loss_sum: Tensor
    num_terms: int
    gradients: dict[str, Tensor]
    lookback: int
    boundary_norms: Tensor
    num_injected: int
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    rate_factor: float = 1.0
    denominator: float | None = None

    @property
    def weight(self) -> float:
        """What the gradients are multiplied by to be those of the summed losses."""
        return float(self.num_injected) if self.denominator is None else self.denominator

    def apply(self, model: nn.Module) -> None:
        """Write the gradients to the parameters' `.grad`, replacing whatever stood there.

        With no loss injected every `.grad` becomes None, so that `optimizer.step()` changes nothing.
        """
        for name, parameter in named_parameters(model).items():
            parameter.grad = self.gradients.get(name) if self.num_injected else None

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of all gradients together, 0-dim."""
        if "gradient_norm" in self.metrics:  # measured by a guard, before it clipped
            return torch.tensor(self.metrics["gradient_norm"], dtype=torch.float64)
        return torch.nn.utils.get_total_norm(self.gradients.values())

    def with_gradients(self, gradients: dict[str, Tensor], **metrics: float) -> Estimate:
        """Return the estimate with other gradients and more metrics, as a guard does."""
        return replace(self, gradients=gradients, metrics=self.metrics | metrics)


class Carry(Protocol):
    """All that an estimator carries from window to window."""

    @property
    def state(self) -> Tree | None:
        """The model's state after the last window, detached; None before the first."""
        ...

    @property
    def finite(self) -> bool:
        """Whether all numbers to go on from are: where not, an update that was refused is best gone back behind."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the carry as plain values and tensors, in dicts and lists."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        ...


class Estimator(ABC):
    """A way to estimate the gradient of a sequence's loss; hyper-parameters only.

    All that evolves is in the carry: `estimate` takes one and returns the next, so that an update can be
    refused by going on with the old one.

    A random one draws from its own `seed` and the number of updates made, so that a resumed run draws what an
    undisturbed one would have.

    Attributes:
        kind: "exact", "biased" or "unbiased", against the gradient of the whole past, at weights that stay.
    """

    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def examples(cls) -> Sequence[Estimator]:
        """Return a few settings with short windows that take every branch between them, for tests to try."""

    def prepare(self, model: nn.Module, inputs: Tree) -> None:
        """Add to the model what this estimator needs in it, before an optimizer is made; most need nothing.

        What is there already stays as it is, and so do the model's outputs and other parameters.

        Args:
            model: the model.
            inputs: an example, leaves (T, B, ...).
        """
        del model, inputs  # nothing to add, unless an estimator says otherwise

    @abstractmethod
    def next_steps(self, carry: Any) -> int:
        """Return how many steps the next window should have."""

    def read(self, stream: Readable, carry: Any) -> Window:
        """Return the next window of a stream, or what stands in its place and only this estimator takes.

        Raises:
            EndOfStream: the pass is over.
        """
        return stream.read(self.next_steps(carry))

    @abstractmethod
    def init(self, model: nn.Module, lanes: int) -> Carry:
        """Return the carry before the first window.

        Raises:
            CapabilityError: the model cannot be trained in windows.
        """

    @abstractmethod
    def estimate(self, model: nn.Module, loss: Loss, carry: Any, window: Window) -> tuple[Estimate, Carry]:
        """Run the model over `window` and estimate the gradient of its losses."""

    def fixed(self, carry: Any) -> Estimator:
        """Return the estimator with the lengths that it has now, for good; itself where none changes or is drawn."""
        del carry  # nothing changes, unless an estimator says otherwise
        return self

    def limits(self, model: nn.Module, inputs: Tree) -> str:
        """Return what of its promise an estimator does not keep for this model; empty if it keeps it.

        `tbptt.check` says it, and so does the trainer before it begins.

        Args:
            model: the model.
            inputs: an example, leaves (T, B, ...).
        """
        del model, inputs  # all of it is kept, unless an estimator says otherwise
        return ""

    @abstractmethod
    def reach(self, steps: int) -> tuple[int, ...] | None:
        """Return how far the loss at each of a window's `steps` steps reaches, its own step included.

        Zero for a loss that is not injected. Holds once the stream is older than the look-back, and until the next
        reset; `tbptt.check` measures it. None: back to the start of the sequence. Empty: it cannot be seen in the
        gradient, as where weights are perturbed at random, or other things than losses are sent back; or nobody can
        say beforehand, as where it depends on what the model looks up.
        """
