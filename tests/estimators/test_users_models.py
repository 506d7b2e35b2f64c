"""Models as users write them, in every estimator: the estimate of the same function written plainly, or a refusal.

Each variant reaches a weight in another way than as an attribute of the module that runs, or asks something else of
the backward pass. With the same random numbers, and weights that an optimizer moves between windows, its estimates
are those of its plain twin; where an estimator refuses it, that stands in REFUSED with the reason.
"""

from __future__ import annotations

import pytest
import torch
from users_models import EXACT, LONGEST, OFTEN, REFUSED, SETTINGS, STEPS, VARIANTS, case_of, data_of, estimates_of

from tbptt import estimators
from tbptt.errors import CapabilityError
from tbptt.estimators.base import Estimator
from tbptt.estimators.perturbation import Perturbation


def test_every_estimator_is_in_the_table() -> None:
    assert {type(each).__name__ for each in SETTINGS.values()} == {
        name
        for name in estimators.__all__
        if isinstance(getattr(estimators, name), type)
        and issubclass(getattr(estimators, name), Estimator)
        and name != "Estimator"
    }
    assert {variant for variant, _ in REFUSED} <= VARIANTS.keys()
    assert {setting for _, setting in REFUSED} <= SETTINGS.keys()
    assert not [key for key in REFUSED if key[1].startswith(("TBPTT", "FullBPTT"))]  # these take all


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "setting", [each if each in OFTEN else pytest.param(each, marks=pytest.mark.slow) for each in SETTINGS]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_that_of_the_plain_function_or_refused(variant: str, setting: str) -> None:
    estimator = SETTINGS[setting]
    case, plain = case_of(variant, setting, plain=False), case_of(variant, setting, plain=True)
    if (variant, setting) in REFUSED:
        with pytest.raises(CapabilityError, match=REFUSED[variant, setting]) as refusal:
            estimates_of(case, estimator, steps=7)
        assert all(name.partition(".")[0] in str(refusal.value) for name in case.special) or setting == "KFRTRL"
        return
    found, wanted = (estimates_of(each, estimator, steps=STEPS.get(setting, LONGEST)) for each in (case, plain))
    assert len(found) == len(wanted)
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        gradients = {
            name.removeprefix("loss:").removeprefix("criterion."): each for name, each in one.all_gradients.items()
        }
        twin = {name.removeprefix("loss:"): plain.finished(name, each) for name, each in other.all_gradients.items()}
        if variant == "unused head":
            assert any(name.startswith("other") for name in gradients) == isinstance(estimator, Perturbation)
            gradients = {name: each for name, each in gradients.items() if not name.startswith("other")}
        assert gradients.keys() == twin.keys(), number
        for name, each in gradients.items():
            assert each.is_sparse == (
                variant == "sparse embedding" and name == "embedding.weight" and not isinstance(estimator, Perturbation)
            )
            torch.testing.assert_close(
                each.to_dense(), twin[name], rtol=1e-10, atol=1e-12, msg=lambda text, at=(number, name): f"{at} {text}"
            )
    for name in case.special:  # the control: what could have been lost is there to be lost
        assert bool(found[-1].gradients[name].to_dense().any())


@pytest.mark.parametrize(("variant", "setting"), [(a, b) for a in VARIANTS for b in EXACT if (a, b) not in REFUSED])
def test_exact_ones_are_plain_autograd(variant: str, setting: str) -> None:
    """One backward() over the whole sequence, by torch alone, hooks and all."""
    below = ("embedding", "enter", "gain") if setting == "ElementwiseRTRL" else ()  # see its `limits`
    case, steps = case_of(variant, setting, plain=False), 9
    found = estimates_of(case, EXACT[setting], steps=steps, rate=0.0)[-1].gradients
    case.net.zero_grad(set_to_none=True)
    inputs, targets = data_of(case)
    outputs, _ = case.net(inputs[:steps])
    case.loss(outputs[steps - 3 :], targets[steps - 3 : steps]).mean().backward()
    wanted = {each: p.grad.to_dense() for each, p in case.net.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for each in wanted:
        if not below or not each.startswith(below):
            torch.testing.assert_close(found[each].to_dense(), wanted[each], rtol=1e-10, atol=1e-12)
