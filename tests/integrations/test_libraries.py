"""Models of other libraries: what they get wrong when called by hand, and that their adapter puts it right."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import carry
import pytest
import torch
import zoo
import zoo_libraries
from torch import nn

import tbptt
from tbptt.errors import CapabilityError

pytestmark = pytest.mark.usefixtures("one_thread")


def need(package: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(package)


def entry(name: str) -> zoo.Entry:
    found = next(each for each in zoo_libraries.LIBRARIES if each.name == name)
    need(found.needs)
    return found


@pytest.mark.parametrize("entry", zoo_libraries.LIBRARIES, ids=str)
def test_through_the_adapter_they_carry(entry: zoo.Entry) -> None:
    need(entry.needs)
    assert carry.table(entry, adapted=True) == entry.marks


@pytest.mark.parametrize("entry", zoo_libraries.LIBRARIES, ids=str)
def test_what_they_do_by_hand_is_known(entry: zoo.Entry) -> None:
    """Fails when a version of the library does better, so that the adapter can do less."""
    need(entry.needs)
    assert carry.table(entry, adapted=False) == entry.by_hand_marks


def test_the_table_in_the_docs_says_what_is_known() -> None:
    """scripts/model_table writes it; the tests above and test_transformers.py hold the models to the same marks."""
    rows = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    signs = str.maketrans("+-!x", "✓✗!○")
    for each in [*zoo.TRANSFORMERS, *zoo_libraries.LIBRARIES]:
        row = f"| {each.name} | {each.by_hand_marks} | {each.marks} | ".translate(signs)
        name = f"| {each.name} | "
        row = name + row[len(name) :]
        assert any(line.startswith(row) for line in rows), row


def test_the_measure_sees_a_state_that_is_dropped() -> None:
    def forgets(module: nn.Module) -> nn.Module:
        return tbptt.stateful(module, lambda module, inputs, state: module(inputs, None))

    layer = entry("coRNN")
    assert carry.table(replace(layer, adapt=forgets), adapted=True).split()[0] == "---"


def test_importing_an_adapter_imports_no_other_library() -> None:
    names = [
        "mambapy",
        "ncps",
        "norse",
        "snntorch",
        "spikingjelly",
        "torchrecurrent",
        "torchrl",
        "transformers",
        "xlstm",
    ]
    script = f"""
import sys, importlib, tbptt
for name in {names}:
    importlib.import_module("tbptt.integrations." + name)
sys.exit(bool({{*{names}, "tensordict"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_min_lstm_is_wrong_in_several_steps_without_max_steps() -> None:
    """It takes the logarithm of g(state), where the state is the g of something already."""
    found = entry("minLSTM")
    several = replace(found, adapt=zoo_libraries.adapt_min_rnn(None))
    assert carry.table(several, adapted=True) == zoo.FORGETS


def test_snntorch_resets_its_own_neurons_and_no_others() -> None:
    found = entry("snnTorch")
    other, module = found.build(), found.build()
    inputs = found.inputs(6)
    for step in inputs:
        other(step)
    before = other[0][1].mem.clone()
    model = found.adapt(module)
    first, _ = model(inputs)
    again, _ = model(inputs)
    assert torch.equal(first, again)
    assert torch.equal(other[0][1].mem, before)


def test_snntorch_utils_reset_overlooks_nested_neurons() -> None:
    """Fails when snnTorch looks deeper, so that the adapter can use its function."""
    found = entry("snnTorch")
    from snntorch import utils

    module = nn.Sequential(found.build())
    module(found.inputs(1)[0])
    before = module[0][0][1].mem.clone()
    utils.reset(module)
    assert torch.equal(module[0][0][1].mem, before)
    assert before.any()


def test_spikingjelly_refuses_mixed_step_modes() -> None:
    module = entry("SpikingJelly m").build()
    module[1].step_mode = "s"
    with pytest.raises(CapabilityError, match="one step mode"):
        entry("SpikingJelly m").adapt(module)


def test_an_xlstm_that_keeps_its_state_is_refused() -> None:
    module = entry("xLSTMLarge train").build()
    module.config.return_last_states = False
    with pytest.raises(CapabilityError, match="return_last_states"):
        entry("xLSTMLarge train").adapt(module)


def test_an_ncps_network_that_returns_its_last_step_is_refused() -> None:
    found = entry("CfC")
    with pytest.raises(CapabilityError, match="return_sequences"):
        found.adapt(zoo_libraries.ncps_network("CfC", return_sequences=False)())


def test_a_policy_without_a_state_is_refused() -> None:
    entry("TorchRL")
    from tensordict.nn import TensorDictModule

    from tbptt.integrations.torchrl import recurrent

    with pytest.raises(CapabilityError, match="handed on"):
        recurrent(TensorDictModule(nn.Linear(3, 2), in_keys=["observation"], out_keys=["action"]))


def test_of_a_policy_any_output_can_be_had() -> None:
    module = entry("TorchRL").build()
    from tbptt.integrations.torchrl import recurrent

    features, _ = recurrent(module, outputs="features")(torch.randn(4, 2, 3))
    assert features.shape == (4, 2, 5)


def test_mambapy_starts_from_its_initial_state() -> None:
    found = entry("mambapy")
    model, inputs = found.adapt(found.build()), found.inputs(4)
    assert torch.equal(model(inputs, None)[0], model(inputs, model.initial_state(zoo.LANES))[0])
