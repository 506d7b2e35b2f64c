"""Lightning under drawn plans: resets, refused windows, lengths that change, stops; see `estimators/plans.py`."""

from __future__ import annotations

import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counting import Counting, counted_loss
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from plans import Drive, Plan, plans, refused
from torch import Tensor

import tbptt

pytest.importorskip("lightning")

from lightning_nets import trainer

from tbptt.integrations.lightning import TBPTTMixin

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*max_epochs.*"),
]


class Planned(TBPTTMixin):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.model = Counting(plan.numbers)
        guards = [tbptt.NonFinite("skip", limit=10**6)]
        self.use_tbptt(plan.estimator(), counted_loss, plan.stream(), guards=guards, checked=False)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return self.model(inputs, state)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def run(plan: Plan, stops: list[int]) -> None:
    drive, saved = Drive(plan), None
    with tempfile.TemporaryDirectory() as directory:
        for number, updates in enumerate(accumulate(stops)):
            while drive.plain.used < updates:
                drive.advance()
                if drive.windows > 100:  # nearly all of them are refused
                    reject()
            net, fitting = Planned(plan), trainer(max_steps=updates, max_epochs=-1)
            fitting.fit(net, ckpt_path=saved, weights_only=False)
            found, wanted = net.model.delta.detach().numpy(), -drive.plain.total
            assert np.allclose(found, wanted, rtol=0, atol=1e-9), f"{plan}, stops {stops}: {found} instead of {wanted}"
            saved = Path(directory) / f"{number}.ckpt"
            fitting.save_checkpoint(saved)


FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)
STOPS = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@given(plan=plans(), stops=STOPS)
@FEW
def test_lightning_does_what_must_happen(plan: Plan, stops: list[int]) -> None:
    run(plan, stops)


@pytest.mark.slow
@given(plan=plans(), stops=STOPS)
@settings(FEW, max_examples=200)
def test_lightning_does_what_must_happen_in_many_plans(plan: Plan, stops: list[int]) -> None:
    run(plan, stops)


def test_the_account_sees_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a refused window's resets that nobody owes."""
    run(refused(), [4])
    monkeypatch.setattr("tbptt.snapshots.Snapshots.with_resets", lambda self, window: window)
    with pytest.raises(AssertionError, match="instead of"):
        run(refused(), [4])
