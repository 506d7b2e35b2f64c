"""Guards that do not fit an estimator, or whoever runs them, are refused where they meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tbptt
from tbptt.errors import ConfigError
from tbptt.guards import AdaptiveClip, ClipNorm, ClipValue, NonFinite, SpikeRollback, ZClip
from tbptt.guards.base import Guard, check_guards

CHANGE_THE_MEAN: list[Callable[..., Guard]] = [
    lambda **allowed: ClipNorm(1.0, **allowed),
    lambda **allowed: ClipValue(1.0, **allowed),
    lambda **allowed: AdaptiveClip(**allowed),
    lambda **allowed: ZClip(**allowed),
    lambda **allowed: SpikeRollback(**allowed),
]


class Unbiased(tbptt.Estimator):
    """TBPTT that says otherwise: what is refused goes by `kind`, of the instance where it has one."""

    kind = "unbiased"
    inner = tbptt.TBPTT(8, 8)

    @classmethod
    def examples(cls) -> tuple[Unbiased, ...]:
        return (cls(),)

    def next_steps(self, carry: Any) -> int:
        return 8

    def init(self, model: nn.Module, lanes: int) -> Any:
        return self.inner.init(model, lanes)

    def reach(self, steps: int) -> tuple[int, ...] | None:
        return self.inner.reach(steps)

    def estimate(self, model: nn.Module, loss: Any, carry: Any, window: tbptt.Window) -> Any:
        return self.inner.estimate(model, loss, carry, window)


def stream() -> tbptt.ArrayStream:
    generator = torch.Generator().manual_seed(0)
    return tbptt.ArrayStream(*(torch.randn(640, 1, generator=generator) for _ in range(2)), lanes=2)


def trainer(guards: list[Any], estimator: tbptt.Estimator) -> tbptt.Trainer:
    model = nn.GRU(1, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return tbptt.Trainer(model, nn.MSELoss(), sgd, estimator, stream(), guards=guards, checked=False)


@pytest.mark.parametrize("make", CHANGE_THE_MEAN, ids=["norm", "value", "adaptive", "z", "spike"])
def test_what_changes_the_mean_is_refused_with_an_unbiased_estimator(make: Callable[..., Guard]) -> None:
    with pytest.raises(ConfigError, match="rare ones balance the many small ones") as error:
        trainer([NonFinite(), make()], Unbiased())
    assert f"{type(make()).__name__}(..., allow_bias=True)" in error.value.fix
    trainer([make(allow_bias=True)], Unbiased()).run(updates=2)
    trainer([make()], tbptt.TBPTT(8, 8)).run(updates=2)
    of_this_one = Unbiased()
    object.__setattr__(of_this_one, "kind", "exact")
    trainer([make()], of_this_one)


@pytest.mark.parametrize("make", CHANGE_THE_MEAN, ids=["norm", "value", "adaptive", "z", "spike"])
@pytest.mark.parametrize("allowed", [1, "yes", None])
def test_a_permission_is_true_or_false(make: Callable[..., Guard], allowed: Any) -> None:
    with pytest.raises(ConfigError, match="allow_bias was expected to be True or False"):
        make(allow_bias=allowed)


def test_what_leaves_the_mean_alone_is_not_refused() -> None:
    trainer([NonFinite("skip")], Unbiased()).run(updates=2)
    trainer([], Unbiased())


def test_in_a_comparison_only_that_one_does_not_race() -> None:
    def found(guards: list[Guard]) -> tbptt.Comparison:
        return tbptt.compare(
            {"biased": tbptt.TBPTT(8, 8), "unbiased": Unbiased()},
            nn.GRU(1, 1),
            stream(),
            loss=nn.MSELoss(),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            updates=3,
            guards=guards,
            points=1,
            burn_in=32,
        )

    biased, unbiased = found([ClipNorm(1.0)]).rows
    assert (biased.updates, unbiased.updates) == (3, 0)
    assert "rare ones balance" in unbiased.failed
    assert unbiased.cosine == biased.cosine  # its gradients were compared all the same
    assert not biased.failed
    assert [row.updates for row in found([ClipNorm(1.0, allow_bias=True)]).rows] == [3, 3]
    with pytest.raises(ConfigError, match="boundary=ClipBoundary"):
        found([tbptt.ClipBoundary(1.0)])


def test_what_is_no_guard_is_refused_and_says_where_it_belongs() -> None:
    with pytest.raises(ConfigError, match="given to the estimator") as error:
        trainer([tbptt.ClipBoundary(2.0)], tbptt.TBPTT(8, 8))
    assert error.value.fix == "TBPTT(k1=..., k2=..., boundary=ClipBoundary(max_norm=2.0))"
    with pytest.raises(ConfigError, match="which is none"):
        trainer([ClipNorm], tbptt.TBPTT(8, 8))


def test_two_that_go_back_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most one guard that goes back"):
        trainer([SpikeRollback(), SpikeRollback(every=7)], tbptt.TBPTT(8, 8))


def test_going_back_is_refused_where_it_cannot_be_done() -> None:
    with pytest.raises(ConfigError, match="SpikeRollback goes back: the sky is low"):
        check_guards([ZClip(), SpikeRollback()], tbptt.TBPTT(8, 8), no_roll_back="the sky is low")
    assert len(check_guards([ZClip()], tbptt.TBPTT(8, 8), no_roll_back="the sky is low")) == 1


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # in Lightning
def test_lightning_refuses_all_of_it_when_told() -> None:
    pytest.importorskip("lightning")
    from tbptt.integrations.lightning import TBPTTMixin

    def told(estimator: tbptt.Estimator, guard: Any) -> None:
        TBPTTMixin().use_tbptt(estimator, nn.MSELoss(), stream(), guards=[guard])

    with pytest.raises(ConfigError, match="rare ones balance"):
        told(Unbiased(), ZClip())
    with pytest.raises(ConfigError, match="ranks, each with a loss of its own, could disagree"):
        told(tbptt.TBPTT(8, 8), SpikeRollback())
    with pytest.raises(ConfigError, match="given to the estimator"):
        told(tbptt.TBPTT(8, 8), tbptt.ClipBoundary(1.0))
    told(Unbiased(), ZClip(allow_bias=True))
