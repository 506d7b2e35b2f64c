"""ELSTM and LRU: their equations in plain NumPy, a state that is carried, and recurrences that are what they say.

Letters: T time, B lanes, M inputs, N units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from elementwise_traces import Array, elstm_online, lru_online, sigmoid
from torch import Tensor, nn
from torch.func import functional_call, vmap

import tbptt
from tbptt.errors import ConfigError, ShapeError
from tbptt.models import ELSTM, LRU, Recurrence, SequenceModel
from tbptt.unroll import unroll

B, M, N = 3, 4, 5
KINDS: dict[str, Callable[[], nn.Module]] = {
    "elstm": lambda: ELSTM(M, N),
    "elstm, 2 layers": lambda: ELSTM(M, N, 2),
    "lru": lambda: LRU(M, N, 2),
    "lru, glu": lambda: LRU(M, N, 2, glu=True),
    "lru, 3 layers, parallel": lambda: LRU(M, N, 2, layers=3, scan="parallel"),
}
every = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _seeded_and_double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made(kind: str) -> nn.Module:
    """A model none of whose parameters is zero, or the same for all units."""
    model = KINDS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def numbers(model: nn.Module, prefix: str = "") -> dict[str, Array]:
    found = {name: value.detach().numpy() for name, value in model.named_parameters()}
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def relative(found: Any, wanted: Any) -> float:
    return float(np.abs(np.asarray(found) - np.asarray(wanted)).max() / np.abs(np.asarray(wanted)).max())


def elstm_in_numpy(p: dict[str, Array], inputs: Array) -> tuple[Array, Array]:
    c, outputs = np.zeros((inputs.shape[1], len(p["w_f"]))), []
    for x in inputs:
        f = sigmoid(x @ p["F"].T + p["w_f"] * c + p["b_f"])
        z = np.tanh(x @ p["Z"].T + p["w_z"] * c + p["b_z"])
        c = f * c + (1 - f) * z
        outputs.append(sigmoid(x @ p["O"].T + c @ p["W_o"].T + p["b_o"]) * c)
    return np.stack(outputs), c


def lru_in_numpy(p: dict[str, Array], inputs: Array) -> tuple[Array, Array]:
    decay = np.exp(-np.exp(p["lru.nu_log"]) + 1j * np.exp(p["lru.theta_log"]))
    b, c = (p[f"lru.{name}_real"] + 1j * p[f"lru.{name}_imag"] for name in "BC")
    if "norm.weight" in p:
        centred = inputs - inputs.mean(-1, keepdims=True)
        centred /= np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        entered = centred * p["norm.weight"] + p["norm.bias"]
    else:
        entered = inputs
    h, outputs = np.zeros((inputs.shape[1], len(decay)), complex), []
    for x in entered:
        h = decay * h + np.exp(p["lru.gamma_log"]) * (x @ b.T)
        outputs.append((h @ c.T).real + x @ p["lru.D"].T)
    y = np.stack(outputs)
    if "glu.weight" in p:
        bent = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        value, gate = np.split(bent @ p["glu.weight"].T + p["glu.bias"], 2, -1)
        y = value * sigmoid(gate)
    return (inputs + y if "norm.weight" in p else y), h


@every
def test_the_equations_in_plain_numpy(kind: str) -> None:
    model, inputs = made(kind), torch.randn(70, B, M)
    outputs, state = model(inputs)
    step = elstm_in_numpy if kind.startswith("elstm") else lru_in_numpy
    wanted = inputs.numpy()
    for layer, leaf in enumerate(state):
        wanted, last = step(numbers(model, f"layers.{layer}."), wanted)
        assert tuple(leaf.shape) == (B, N)
        assert relative(leaf.detach(), last) < 1e-12
    assert relative(outputs.detach(), wanted) < 1e-12
    own = numbers(model, "layers.0.")  # the control: weights that are off by a billionth are seen
    off = {name: value * (1 + 1e-9) for name, value in own.items()}
    assert relative(step(off, inputs.numpy())[0], step(own, inputs.numpy())[0]) > 1e-11


@every
@pytest.mark.parametrize("sizes", [(1,) * 90, (64, 26), (70, 20), (7, 83)])
def test_chunks_with_the_carried_state_equal_one_pass(kind: str, sizes: tuple[int, ...]) -> None:
    model, inputs = made(kind), torch.randn(90, B, M)
    whole, last = model(inputs)
    state, pieces = None, []
    for chunk in inputs.split(sizes):
        outputs, state = model(chunk, state)
        pieces.append(outputs)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=1e-12)
    assert isinstance(state, tuple)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)
    forgotten, _ = model(inputs[-sizes[-1] :])  # the control
    assert not forgotten.allclose(pieces[-1], atol=1e-6)


@every
def test_a_lane_that_is_reset_starts_from_zeros(kind: str) -> None:
    model, inputs = made(kind), torch.randn(20, B, M)
    reset = torch.zeros(20, B, dtype=torch.bool)
    reset[8, 1] = True
    dims = tuple(0 for _ in model(inputs)[1])
    outputs, _ = unroll(model, tbptt.Window(inputs, reset=reset), None, dims)
    fresh, whole = model(inputs[8:])[0], model(inputs)[0]
    torch.testing.assert_close(outputs[8:, 1], fresh[:, 1], rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs[:, [0, 2]], whole[:, [0, 2]], rtol=0, atol=1e-12)
    assert not whole[8:, 1].allclose(fresh[:, 1], atol=1e-6)


@every
def test_check_passes(kind: str) -> None:
    report = tbptt.check(made(kind), torch.randn(24, 2, M), tbptt.TBPTT(4, 9))
    assert all(item.verdict == "ok" for item in report.items), str(report)


def online(kind: str, steps: int, **how: Any) -> tuple[dict[str, Array], dict[str, Array]]:
    """The online gradients by the traces, and those of the whole sequence by automatic differentiation."""
    model, inputs = made(kind), torch.randn(steps, B, M)
    outputs, _ = model(inputs)
    weights = torch.randn_like(outputs)
    (outputs * weights).sum().backward()
    (recurrence,) = model.recurrences()
    whole = {name: model.get_parameter(name).grad.numpy() for name in recurrence.parameters}
    prefix = "layers.0.lru." if kind == "lru" else "layers.0."
    traces = lru_online if kind == "lru" else elstm_online
    found = traces(numbers(model, prefix), inputs.numpy(), weights.numpy(), **how)
    return {prefix + name: value for name, value in found.items()}, whole


def apart(found: dict[str, Array], whole: dict[str, Array]) -> float:
    assert found.keys() == whole.keys()  # what drives the recurrence is all that is declared, and the other way round
    return max(relative(found[name], whole[name]) for name in whole)


def test_the_traces_of_elstm_are_its_gradient() -> None:
    assert apart(*online("elstm", 70)) < 1e-12
    assert apart(*online("elstm", 70, through_z=False)) > 1e-2  # the control: a path that is easily forgotten


@pytest.mark.parametrize("scan", ["sequential", "parallel"])
def test_the_traces_of_lru_are_its_gradient(scan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "lru", lambda: LRU(M, N, 2, scan=scan))
    found, whole = online("lru", 200)
    assert apart(found, whole) < 1e-11
    flipped = found | {"layers.0.lru.B_imag": -found["layers.0.lru.B_imag"]}  # the control
    assert apart(flipped, whole) > 1e-2


@every
def test_each_state_depends_on_its_own_unit_only(kind: str) -> None:
    model, inputs = made(kind), torch.randn(3, 1, M)
    others = list(model(inputs)[1])
    for recurrence in model.recurrences():
        for part in (torch.real, torch.imag) if others[0].is_complex() else (torch.real,):

            def of(state: Tensor, leaf: int = recurrence.leaf, part: Any = part) -> Tensor:
                given = tuple(state.to(each) if k == leaf else each for k, each in enumerate(others))
                return part(model(inputs, given)[1][leaf])

            found = torch.autograd.functional.jacobian(of, torch.randn(1, N)).reshape(N, N)
            assert found.diagonal().abs().min() > 0
            assert found.equal(torch.diag(found.diagonal()))
    gru, inputs = nn.GRU(M, N), torch.randn(3, 1, M)  # the control
    found = torch.autograd.functional.jacobian(lambda state: gru(inputs, state)[1], torch.randn(1, 1, N))
    found = found.reshape(N, N)
    assert not found.allclose(torch.diag(found.diagonal()))


@every
def test_row_k_of_what_is_declared_drives_unit_k_and_nothing_else_drives_it(kind: str) -> None:
    model, inputs = made(kind), torch.randn(6, 2, M)
    parameters = dict(model.named_parameters())
    for recurrence in model.recurrences():
        assert all(len(parameters[name]) == N for name in recurrence.parameters)
        leaf = model(inputs)[1][recurrence.leaf]
        for unit in range(N):
            total = torch.view_as_real(leaf)[:, unit] if leaf.is_complex() else leaf[:, unit]
            weights = torch.rand(total.shape)
            found = torch.autograd.grad(
                (total * weights).sum(), list(parameters.values()), retain_graph=True, allow_unused=True
            )
            by_name = dict(zip(parameters, found, strict=True))
            for name in recurrence.parameters:
                rows = by_name[name].reshape(N, -1).abs().sum(1)
                assert rows[unit] > 0
                assert rows[torch.arange(N) != unit].eq(0).all()
            own = f"layers.{recurrence.leaf}."  # of its own layer nothing else reaches it, but a norm before it
            rest = [name for name in parameters if name.startswith(own) and name not in recurrence.parameters]
            assert rest
            assert all(by_name[name] is None for name in rest if ".norm." not in name)


def test_recurrences_have_the_places_and_names_of_the_model_around() -> None:
    model = SequenceModel(6, 6, hidden=N, embedding=M, core="elstm", layers=2)
    names = dict(model.named_parameters())
    assert [each.leaf for each in model.recurrences()] == [0, 1]
    assert all(len(names[name]) == N for each in model.recurrences() for name in each.parameters)
    assert model.recurrences()[1].parameters[0] == "core.layers.1.F"
    assert SequenceModel(6, 6, hidden=N, core="lru").recurrences()[0].parameters[-1] == "core.layers.0.lru.B_imag"
    for core in ("lstm", "gru", "rnn"):
        assert SequenceModel(6, 6, hidden=N, core=core).recurrences() == ()
    for leaf, parameters in ((-1, ("w",)), (0, ())):
        with pytest.raises(ConfigError, match="a place from 0 on"):
            Recurrence(leaf, parameters)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, of jvp
@every
def test_many_weights_run_side_by_side(kind: str) -> None:
    """Under vmap, its warnings errors; and gradients in forward mode are those in reverse mode."""
    models, inputs = [made(kind) for _ in range(3)], torch.randn(70, B, M)
    stacked = {
        name: torch.stack([each.get_parameter(name).detach() for each in models])
        for name, _ in models[0].named_parameters()
    }

    def run(parameters: dict[str, Tensor]) -> Tensor:
        outputs, state = functional_call(models[0], parameters, (inputs[:66],))
        return torch.cat([outputs, functional_call(models[0], parameters, (inputs[66:], state))[0]])

    together = vmap(run)(stacked)
    for model, found in zip(models, together, strict=True):
        torch.testing.assert_close(found, model(inputs)[0], rtol=0, atol=1e-12)
    assert not together[0].allclose(together[1])
    one = {name: value[0] for name, value in stacked.items()}
    directions = {name: torch.randn_like(value) for name, value in one.items()}
    _, forward = torch.func.jvp(run, (one,), (directions,))
    gradients = vmap(torch.func.grad(lambda parameters: run(parameters).sum()))(stacked)
    reverse = sum((gradients[name][0] * directions[name]).sum() for name in one)
    torch.testing.assert_close(forward.sum(), reverse, rtol=1e-9, atol=0)


@every
def test_single_precision_and_autocast(kind: str) -> None:
    model = made(kind).float()
    outputs, state = model(torch.randn(5, B, M, dtype=torch.float32))
    single = torch.complex64 if kind.startswith("lru") else torch.float32
    assert outputs.dtype == torch.float32
    assert state[0].dtype == single
    for steps in (5, 1):
        inputs = torch.randn(steps, 1, M, dtype=torch.float32)
        wanted, _ = model(inputs)
        with torch.autocast("cpu", torch.bfloat16):  # in which the state stays as exact as it is
            narrow, state = model(inputs)
            model(inputs, state)  # which takes it
        assert state[0].dtype == single
        torch.testing.assert_close(narrow.float(), wanted, rtol=0.1, atol=0.1)


@every
def test_inputs_and_states_of_another_kind_are_refused(kind: str) -> None:
    model = made(kind)
    _, state = model(torch.randn(5, B, M))
    with pytest.raises(ShapeError, match=r"\(T, B, 4\) were expected.*\(5, 3\)"):
        model(torch.randn(5, B))
    with pytest.raises(ShapeError, match=r"\(T, B, 4\) were expected.*\(5, 3, 7\)"):
        model(torch.randn(5, B, 7))
    with pytest.raises(ShapeError, match=r"\(B, N\) = \(2, 5\).*\(3, 5\)"):
        model(torch.randn(5, 2, M), state)
    other = tuple(leaf.to(torch.complex64 if leaf.is_complex() else torch.float32) for leaf in state)
    with pytest.raises(ShapeError, match=r"was expected for layer 0, but torch.(float32|complex64)"):
        model(torch.randn(5, B, M), other)
    with pytest.raises(ShapeError, match="a tuple with one for each layer, but 1 came, in a Tensor"):
        model(torch.randn(5, B, M), state[0])
    with pytest.raises(ShapeError, match=f"a state of {len(state)} tensors"):
        model(torch.randn(5, B, M), (*state, state[0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ELSTM(0, 4), "inputs was expected"),
        (lambda: ELSTM(3, 4, 0), "layers was expected"),
        (lambda: ELSTM(3, 4, dropout=0.5), "more than one layer"),
        (lambda: ELSTM(3, 4, 2, dropout=1.0), "from 0 to below 1"),
        (lambda: LRU(3, 4.0), "hidden was expected"),
        (lambda: LRU(3, 4, 0), "outputs was expected"),
        (lambda: LRU(3, 4, dropout=0.5), "glu=True or more than one layer"),
        (lambda: LRU(3, 4, r_max=1.0), "r_max=1.0"),
        (lambda: LRU(3, 4, r_min=0.0, r_max=0.0), "r_max=0.0"),
        (lambda: LRU(3, 4, r_min=0.95, r_max=0.9), "r_min=0.95"),
        (lambda: LRU(3, 4, max_phase=0.0), "max_phase above 0"),
        (lambda: LRU(3, 4, scan="fast"), "'parallel' or 'sequential'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "hint:" in str(caught.value)


@pytest.mark.parametrize(("core", "updates", "lr"), [("elstm", 300, 0.03), ("lru", 80, 0.01)])
def test_a_small_model_learns_what_its_state_must_hold(core: Any, updates: int, lr: float) -> None:
    def loss_after(forget: bool) -> float:
        torch.manual_seed(0)
        stream = tbptt.streams.DelayedRecall(2, 8, one_hot=True, steps=100_000)
        model, losses = SequenceModel(4, 4, hidden=24, core=core), list[float]()
        optimizer, estimator = torch.optim.Adam(model.parameters(), lr=lr), tbptt.TBPTT(8, 8)
        carry = estimator.init(model, 8)
        for _ in range(updates):
            window = stream.read(8)
            if forget:  # every step a sequence of its own
                window = tbptt.Window(window.inputs, window.targets, window.mask, torch.ones(8, 8, dtype=torch.bool))
            estimate, carry = estimator.estimate(model, nn.CrossEntropyLoss(), carry, window)
            estimate.apply(model)
            optimizer.step()
            losses.append(float(estimate.loss))
        return sum(losses[-10:]) / 10

    assert loss_after(forget=False) < 0.5 * math.log(4)
    assert loss_after(forget=True) > 0.8 * math.log(4)  # the control
