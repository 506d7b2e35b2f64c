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

from tbptt.errors import ConfigError
from tbptt.estimators.gradients import numbers_of
from tbptt.loss import Loss
from tbptt.model import named_parameters
from tbptt.rereading import Readable
from tbptt.tree import Tree
from tbptt.window import Window

__all__ = ["LOSS_PREFIX", "Carry", "Estimate", "Estimator"]

LOSS_PREFIX = "loss:"
"""What the names of the loss's own parameters begin with in `Estimate.all_gradients`; no parameter's name does."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """One update's gradient estimate, and what was seen on the way.

    Args:
        outputs: the model's outputs for this window, detached; None unless the estimator keeps them.
        loss: the mean of the window's reported losses, 0-dim, over the targets that count, with class weights over
            their weights, as in torch; NaN when it had none.
        loss_sum: the sum of the reported losses, 0-dim.
        num_terms: the number of reported losses.
        gradients: of sum / count over the *injected* losses, keyed as `model.named_parameters()`. A parameter that no
            injected loss depends on has no key, as torch leaves its `.grad` at None. Owned by the estimate. Where the
            count is random, of sum / `denominator`.
        lookback: the number of steps the newest injected loss was back-propagated through.
        boundary_norms: norm of the gradient with respect to the state at each boundary crossed, newest
            first. Shape (K,). Which boundaries these are each estimator says.
        num_injected: the number of losses injected; with none there is nothing to learn from this window.
        metrics: whatever else the estimator or a guard has measured; "loss/NAME" for each term of a loss that returns
            a dict of them, which add up to `loss`.
        rate_factor: what the learning rate of this one update is to be multiplied by; see `tbptt.scaled_rate`. 1 but
            for lengths that change and say so.
        loss_denominator: what `loss_sum` is divided by to be `loss`; None: `num_terms`. Another one where the loss
            weighs its targets by class.
        denominator: what the gradients of the summed losses were divided by; None: `num_injected`. Another one where
            that number is random and hangs together with the sum, as the mean of such ratios is not the ratio of means;
            or where the loss weighs its targets, by class: the sum of the weights of those that count.
        loss_gradients: likewise for the parameters of a loss that is a module, keyed as `loss.named_parameters()`;
            those that belong to the model as well are the model's, and stand among `gradients`.
        boundary_lags: how many steps before the end of the window each of `boundary_norms` was measured; empty where an
            estimator does not say.
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
    loss_denominator: float | None = None
    loss_gradients: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    boundary_lags: tuple[int, ...] = ()

    @property
    def all_gradients(self) -> dict[str, Tensor]:
        """Those of the model and of the loss together, the loss's under "loss:" and their names; for guards."""
        if not self.loss_gradients:
            return self.gradients
        return self.gradients | {f"{LOSS_PREFIX}{name}": each for name, each in self.loss_gradients.items()}

    @property
    def weight(self) -> float:
        """What the gradients are multiplied by to be those of the summed losses."""
        return float(self.num_injected) if self.denominator is None else self.denominator

    @property
    def loss_weight(self) -> float:
        """What `loss_sum` is divided by to be `loss`; 0 where there is nothing to report."""
        return float(self.num_terms) if self.loss_denominator is None or not self.num_terms else self.loss_denominator

    def apply(self, model: nn.Module, loss: object = None) -> None:
        """Write the gradients to the parameters' `.grad`, replacing whatever stood there.

        A parameter without a gradient gets None, so that `optimizer.step()` leaves it alone, weight decay included;
        with no loss injected that is every one of them. Hooks of `register_post_accumulate_grad_hook` are called once
        for each parameter that gets one, as after a backward pass.

        Args:
            model: that was trained.
            loss: likewise, where it has parameters of its own.

        Raises:
            ConfigError: there are gradients of the loss's parameters, but no loss is given.
        """
        if self.loss_gradients and not isinstance(loss, nn.Module):
            came = "none" if loss is None else f"a {type(loss).__name__}"
            raise ConfigError(
                f"the loss was expected as well, since it has parameters that are trained "
                f"({', '.join(self.loss_gradients)}), but {came} came: they would never change",
                fix="estimate.apply(model, loss)",
            )
        if isinstance(loss, nn.Module):  # first: what belongs to the model as well is the model's
            for name, parameter in named_parameters(loss).items():
                _write(parameter, self.loss_gradients.get(name) if self.num_injected else None)
        for name, parameter in named_parameters(model).items():
            _write(parameter, self.gradients.get(name) if self.num_injected else None)

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of all gradients together, 0-dim."""
        if "gradient_norm" in self.metrics:  # measured by a guard, before it clipped
            return torch.tensor(self.metrics["gradient_norm"], dtype=torch.float64)
        return torch.nn.utils.get_total_norm([numbers_of(each) for each in self.all_gradients.values()])

    def with_gradients(self, gradients: dict[str, Tensor], **metrics: float) -> Estimate:
        """Return the estimate with other gradients and more metrics, as a guard does.

        Args:
            gradients: of the model and of the loss, named as in `all_gradients`.
            metrics: added to those that are there.
        """
        if not self.loss_gradients:
            return replace(self, gradients=gradients, metrics=self.metrics | metrics)
        own, of_loss = by_owner(gradients)
        return replace(self, gradients=own, loss_gradients=of_loss, metrics=self.metrics | metrics)


def by_owner(gradients: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of the model, and those of the loss by its own names, of all together."""
    of_loss = {name.removeprefix(LOSS_PREFIX): each for name, each in gradients.items() if name.startswith(LOSS_PREFIX)}
    if not of_loss:
        return gradients, of_loss
    return {name: each for name, each in gradients.items() if not name.startswith(LOSS_PREFIX)}, of_loss


def _write(parameter: Tensor, gradient: Tensor | None) -> None:
    parameter.grad = gradient
    hooks = parameter._post_accumulate_grad_hooks if gradient is not None else None  # pyright: ignore
    for hook in tuple(hooks.values()) if hooks else ():
        hook(parameter)


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
