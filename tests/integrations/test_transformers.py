"""Models of transformers: what they get wrong when called by hand, and that their adapter puts it right."""

from __future__ import annotations

from dataclasses import replace

import carry
import pytest
import torch
import zoo
from torch import nn

import tbptt
from tbptt.errors import CapabilityError
from tbptt.pathways import pathways_of
from tbptt.tree import leaf_names, tensors

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("entry", zoo.TRANSFORMERS, ids=str)
def test_through_the_adapter_they_carry(entry: zoo.Entry) -> None:
    assert carry.table(entry, adapted=True) == entry.marks


@pytest.mark.parametrize("entry", zoo.TRANSFORMERS, ids=str)
def test_what_they_do_by_hand_is_known(entry: zoo.Entry) -> None:
    """Fails when a version of transformers does better, so that the adapter can do less."""
    pytest.importorskip(entry.needs)
    assert carry.table(entry, adapted=False) == entry.by_hand_marks


def test_the_measure_sees_a_state_that_is_dropped() -> None:
    def forgets(module: nn.Module) -> nn.Module:
        model = zoo.adapt_transformer(module)
        return tbptt.stateful(model, lambda model, inputs, state: model(inputs, None))

    entry = replace(zoo.TRANSFORMERS[0], adapt=forgets)
    assert carry.table(entry, adapted=True) == "--- --- ---"


def test_the_measure_sees_a_state_that_is_cut() -> None:
    def cuts(module: nn.Module) -> nn.Module:
        model = zoo.adapt_transformer(module)
        return tbptt.stateful(model, lambda model, inputs, state: model(inputs, tbptt.tree.detach(state)))

    entry = replace(zoo.TRANSFORMERS[0], adapt=cuts)
    assert carry.table(entry, adapted=True) == "+++ --- +++"


def test_token_ids_are_their_embeddings() -> None:
    module = zoo.transformer("Mamba2").eval()
    model, ids = zoo.adapt_transformer(module), zoo.tokens(8)
    by_ids, _ = model(ids)
    by_embeddings, _ = model(module.get_input_embeddings()(ids))
    torch.testing.assert_close(by_ids, by_embeddings, rtol=0, atol=0)
    assert by_ids.shape == (8, zoo.LANES, zoo.VOCABULARY)


def test_without_a_head_the_outputs_are_hidden_states() -> None:
    import transformers

    config = transformers.Mamba2Config(**zoo.SIZES | zoo.CONFIGURATIONS["Mamba2"])
    outputs, state = zoo.adapt_transformer(transformers.Mamba2Model(config))(zoo.tokens(8))
    assert outputs.shape == (8, zoo.LANES, 32)
    assert state is not None


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba", "Jamba"])
def test_those_that_forget_are_given_single_steps(kind: str) -> None:
    module, lengths = zoo.transformer(kind), []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        zoo.adapt_transformer(module)(zoo.tokens(5))
    assert lengths == [1] * 5


def test_recurrent_gemma_keeps_its_state_to_itself() -> None:
    module = zoo.transformer("RecurrentGemma")
    with pytest.raises(CapabilityError, match="keeps its state in attributes of its own"):
        zoo.adapt_transformer(module)(zoo.tokens(4))


def test_what_recurrent_gemma_keeps_inside_is_not_all_it_needs() -> None:
    entry = replace(
        zoo.transformer_entry("RecurrentGemma"),
        inputs=zoo.tokens,
        adapt=lambda module: tbptt.stateful(
            module, inside=True, outputs="logits", arguments={"use_cache": True}, batch_first=True
        ),
        whole=lambda module, ids: module(ids.transpose(0, 1), use_cache=False).logits.transpose(0, 1),
    )
    assert set(carry.table(entry, adapted=True)) <= set("-! ")


def test_a_module_that_takes_no_state_is_refused() -> None:
    with pytest.raises(CapabilityError, match="cache_params, state, past_key_values"):
        zoo.adapt_transformer(nn.Linear(2, 2))


HYBRIDS = ("Jamba", "Zamba2", "FalconH1", "Bamba", "MiniMax", "Lfm2")


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_cache_of_attention_is_told_from_the_recurrence(name: str) -> None:
    entry = next(each for each in zoo.TRANSFORMERS if each.name == name)
    model = entry.adapt(entry.build())
    _, state = model(entry.inputs(6))
    ways, names = pathways_of(model, state), leaf_names(state)
    told = {way: {names[place].split(".")[-1].split("[")[0] for place in places} for way, places in ways.items()}
    assert told["attention"] == {"keys", "values"}
    assert told["recurrence"] <= {"conv_states", "recurrent_states", "linear_cache"}
    assert sum(map(len, ways.values())) == sum(leaf.is_floating_point() for leaf in tensors(state))


def test_how_far_a_hybrid_looks_is_told_apart() -> None:
    entry = next(each for each in zoo.TRANSFORMERS if each.name == "Jamba")
    model = entry.adapt(entry.build())
    stream = tbptt.ArrayStream(torch.randint(zoo.VOCABULARY, (400,)), torch.randint(zoo.VOCABULARY, (400,)), lanes=2)
    report = tbptt.horizon.measure(model, nn.CrossEntropyLoss(), stream, max_lag=8, probes=3, costs=False)
    assert set(report.pathways) == {"attention", "recurrence"}
    assert all(norm > 0 for way in report.pathways.values() for norm in way.crossing.mean)
    plain = next(each for each in zoo.TRANSFORMERS if each.name == "Mamba2")
    model = plain.adapt(plain.build())
    report = tbptt.horizon.measure(model, nn.CrossEntropyLoss(), stream, max_lag=8, probes=3, costs=False)
    assert report.pathways == {}
