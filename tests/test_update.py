"""The update step: who is trained, in which mode, and what is refused before it begins."""

from __future__ import annotations

import ast
import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.comparison import compare
from tbptt.comparison.races import Race, Runner
from tbptt.distributed import refuse_ranks
from tbptt.errors import AlarmWarning, CheckpointError, ConfigError
from tbptt.loss import StepLoss
from tbptt.online import Online
from tbptt.update import Updater

ROOT = Path(tbptt.__file__).parent
STEPS = {"self.scheduler", "self._entry", "self._entry.lift", "self.lift", "module"}
"""What has a method `step` and is no optimizer: schedulers, values to learn from, modules of other libraries."""


def steps_of_optimizers(source: str) -> list[str]:
    """The functions in which `.step(...)` is called, once for each call, but for what is known to be no optimizer."""
    found: list[str] = []

    def walk(node: ast.AST, function: str) -> None:
        inside = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step":
            if ast.unparse(node.func.value) not in STEPS:
                found.append(inside)
        for child in ast.iter_child_nodes(node):
            walk(child, inside)

    if ".step(" in source:
        walk(ast.parse(source), "")
    return found


def test_one_function_makes_the_optimizer_step() -> None:
    paths = [path for path in ROOT.rglob("*.py") if "testing" not in path.parts]
    found = {str(path.relative_to(ROOT)): steps_of_optimizers(path.read_text(encoding="utf-8")) for path in paths}
    assert {name: each for name, each in found.items() if each} == {"update.py": ["update"]}


def test_the_test_sees_another_one() -> None:
    assert steps_of_optimizers("def train(net):\n    adam = net.optimizers()\n    adam.step()") == ["train"]
    assert steps_of_optimizers("def train(self):\n    self.scheduler.step()") == []


class Net(nn.Module):
    """Takes down the modes that it is trained in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core, self.drop, self.head = nn.GRU(2, 4), nn.Dropout(0.5), nn.Linear(4, 2)
        self.modes: list[tuple[bool, bool, bool]] = []

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.modes.append((torch.is_grad_enabled(), self.training, self.drop.training))
        outputs, state = self.core(inputs, state)
        return self.head(self.drop(outputs)), state

    @property
    def trained_in(self) -> set[tuple[bool, bool]]:
        return {modes[1:] for modes in self.modes if modes[0]}


class Scaled(nn.Module):
    """A loss with a parameter, a buffer, and a mode."""

    def __init__(self, tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.tied = tied
        self.register_buffer("seen", torch.zeros(()))
        self.modes: list[bool] = []

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.modes.append(self.training)
        if self.training:
            self.seen += 1
        return (outputs * self.scale - targets).square().sum(-1)


def stream(rows: int = 200) -> tbptt.ArrayStream:
    data = torch.randn(rows, 2, generator=torch.Generator().manual_seed(1))
    return tbptt.ArrayStream(data, data.roll(1, 0), lanes=2)


def sgd(parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, **settings)


def trainer(model: nn.Module, loss: Any = None, optimizer: Any = None, **settings: Any) -> tbptt.Trainer:
    settings = {"checked": False} | settings
    optimizer = optimizer or sgd(model.parameters())
    return tbptt.Trainer(model, loss or nn.MSELoss(), optimizer, tbptt.TBPTT(8, 8), stream(), **settings)


def online(model: nn.Module, loss: Any = None, optimizer: Any = None) -> Online:
    return Online(model, loss or nn.MSELoss(), optimizer or sgd(model.parameters()), tbptt.TBPTT(2, 2), lanes=2)


def runner(model: nn.Module, loss: Any = None, optimizer: Any = None) -> Runner:
    setting = Race(lambda parameters: optimizer or sgd(parameters), None, 10)
    example = torch.zeros(8, 2, 2)
    return Runner(model, tbptt.TBPTT(8, 8), StepLoss.of(loss or nn.MSELoss()), stream(), setting, example)


WHO: dict[str, Callable[..., Any]] = {"trainer": trainer, "online": online, "race": runner}


@pytest.mark.parametrize("who", WHO)
def test_an_optimizer_over_another_copy_is_refused(who: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match="none of the model's: it was made for another copy"):
        WHO[who](model, None, sgd(copy.deepcopy(model).parameters()))


def test_an_optimizer_that_holds_something_else_as_well_is_refused() -> None:
    model, encoder = Net(), nn.Linear(3, 2)
    with pytest.raises(
        ConfigError, match=r"2 of the 8 that this SGD holds belong to neither \(shapes \(2, 3\), \(2,\)\)"
    ):
        trainer(model, None, sgd([*model.parameters(), *encoder.parameters()]))
    loss = Scaled()
    with pytest.raises(ConfigError, match="belong to neither") as caught:  # a function hides whose these are
        trainer(model, lambda *pair: loss(*pair), sgd([*model.parameters(), *loss.parameters()]))
    assert "the loss an nn.Module that holds them" in caught.value.fix


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().step(closure)


@pytest.mark.parametrize("who", ["trainer", "online"])
@pytest.mark.parametrize("kind", [torch.optim.LBFGS, NeedsClosure])
def test_an_optimizer_with_a_closure_is_refused(kind: type[torch.optim.Optimizer], who: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match="needs 'closure'") as caught:
        WHO[who](model, None, kind(model.parameters(), lr=0.1))
    assert "optimizer.step(closure)" in caught.value.fix


def test_what_is_proposed_in_its_place_works() -> None:
    """The text of the fix, run."""
    model, source, estimator = Net(), stream(), tbptt.TBPTT(20, 20)
    model.drop.p, loss, losses = 0.0, nn.MSELoss(), []
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
    with pytest.raises(ConfigError) as caught:
        trainer(model, loss, optimizer)
    code = "\n".join(line.removeprefix("    ") for line in caught.value.fix.splitlines()[1:])
    place: dict[str, Any] = {"model": model, "loss": loss, "estimator": estimator, "optimizer": optimizer}
    place["carry"] = estimator.init(model, 2)
    for _ in range(5):
        for window in source.windows(20):
            place["window"] = window
            exec(code, place)
            losses.append(float(estimator.estimate(model, loss, place["carry"], window)[0].loss))
        source.rewind()
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_parameters_that_nobody_trains_are_named_once() -> None:
    model, loss = Net(), Scaled()
    with pytest.warns(AlarmWarning, match=r"3 of 7 parameters .* \(head.weight, head.bias, loss:scale\)"):
        run = trainer(model, loss, sgd(model.core.parameters()))
    run.run(updates=2)  # not said again
    for each in (*model.head.parameters(), *loss.parameters()):
        each.requires_grad_(False)
    trainer(model, loss, sgd(model.core.parameters()))


@pytest.mark.parametrize("who", WHO)
def test_a_model_in_eval_mode_is_trained_in_train_mode_which_is_said_once(who: str) -> None:
    model, loss = Net().eval(), Scaled().eval()
    made = WHO[who](model, loss, sgd([*model.parameters(), *loss.parameters()]) if who != "race" else None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if who == "trainer":
            made.run(updates=3)
        elif who == "race":
            made.turn(0.1)
        else:
            made.learn_many(torch.randn(6, 2, 2), torch.randn(6, 2, 2))
            made.predict_one(torch.randn(2, 2))
    assert made.model.trained_in == {(True, True)}
    assert (made.model.training, made.loss.module.training) == (True, True)
    assert set(made.loss.module.modes) == {True}
    words = [str(each.message) for each in said if each.category is AlarmWarning]
    assert [each.split(" was")[0] for each in words] == ["the model", "the loss"]


def test_parts_in_eval_mode_stay_so() -> None:
    """Also after a validation, which is in eval mode as a whole."""
    model = Net()
    model.drop.eval()
    held_out = tbptt.HeldOut(stream(60), every=2)
    trainer(model, held_out=held_out).run(updates=5)
    assert model.trained_in == {(True, False)}
    assert {modes[1:] for modes in model.modes if not modes[0]} >= {(False, False)}
    assert (model.training, model.core.training, model.drop.training) == (True, True, False)


def test_the_loss_is_in_eval_mode_while_validating() -> None:
    model, loss = Net(), Scaled()
    tbptt.evaluate(model, loss, stream())
    assert (set(loss.modes), loss.training, float(loss.seen)) == ({False}, True, 0.0)


class Cell(nn.Module):
    """Runs in the types that autocast gives it; its state is in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, self.head = nn.Linear(6, 4), nn.Linear(4, 1)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state, outputs = inputs.new_zeros(inputs.shape[1], 4) if state is None else state, []
        for each in inputs:
            state = torch.tanh(self.step(torch.cat([each, state], -1))).float()
            outputs.append(self.head(state).float())
        return torch.stack(outputs), state


def echo() -> tbptt.ArrayStream:
    inputs = torch.randn(640, 2, generator=torch.Generator().manual_seed(2))
    return tbptt.ArrayStream(inputs, inputs[:, :1] * 0.5 + inputs[:, 1:].roll(1, 0), lanes=8)


def autocast_loss(by: str, autocast: bool) -> float:
    model, source, estimator = Cell(), echo(), tbptt.TBPTT(8, 16)
    adam, around = torch.optim.Adam(model.parameters(), lr=1e-2), torch.autocast("cpu", torch.bfloat16)
    with around if autocast else nullcontext():
        if by == "trainer":
            held_out = tbptt.HeldOut(echo(), every=7)
            tbptt.Trainer(model, nn.MSELoss(), adam, estimator, source, held_out=held_out).run(passes=6)
        carry = estimator.init(model, 8)
        for _ in range(6 if by == "loop" else 0):
            for window in source.windows(8):
                estimate, carry = estimator.estimate(model, nn.MSELoss(), carry, window)
                estimate.apply(model)
                adam.step()
            source.rewind()
            tbptt.evaluate(model, nn.MSELoss(), echo())  # without a graph: its casts must not be used again
    return tbptt.evaluate(model, nn.MSELoss(), echo())["loss"]


@pytest.mark.parametrize("by", ["trainer", "loop"])
def test_autocast_around_all_of_it_learns(by: str) -> None:
    """Casts of the weights that were taken before a step must not be used after it."""
    plain, cast = autocast_loss(by, False), autocast_loss(by, True)
    assert cast == pytest.approx(plain, rel=0.05)
    assert plain < 0.5 * tbptt.evaluate(Cell(), nn.MSELoss(), echo())["loss"]


def with_loss(directory: Path | None = None, **settings: Any) -> tbptt.Trainer:
    model, loss = Net(), Scaled()
    model.drop.p = 0.0
    both = sgd([*model.parameters(), *loss.parameters()], momentum=0.9)
    settings = {"checked": False} | settings
    return tbptt.Trainer(model, loss, both, tbptt.TBPTT(8, 8), stream(), directory=directory, **settings)


def own(run: tbptt.Trainer) -> dict[str, Tensor]:
    assert run.loss.module is not None
    return {name: each.clone() for name, each in run.loss.module.state_dict().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_loss_is_trained_saved_and_resumed(tmp_path: Path) -> None:
    whole = with_loss()
    before = own(whole)
    whole.run(updates=12)
    assert not torch.equal(own(whole)["scale"], before["scale"])
    with_loss(tmp_path).run(updates=5)
    rest = with_loss(tmp_path)
    rest.run(updates=12)
    assert equal(own(rest), own(whole))
    assert equal(dict(rest.model.state_dict()), dict(whole.model.state_dict()))


def test_another_loss_is_refused_and_so_is_a_checkpoint_without_it(tmp_path: Path) -> None:
    run = with_loss(tmp_path)
    run.run(updates=2)
    other = tbptt.Trainer(run.model, nn.MSELoss(), sgd(run.model.parameters()), tbptt.TBPTT(8, 8), stream())
    with pytest.raises(CheckpointError, match=r"with scale\[2\], seen\[\], but it has none"):
        other.updater.load_state_dict(run.updater.state_dict())
    old = {name: each for name, each in run.updater.state_dict().items() if name != "loss"}
    with pytest.raises(CheckpointError, match="neither trained nor saved them"):
        run.updater.load_state_dict(old)
    other.updater.load_state_dict(old)  # a loss without parameters goes on from an old one


def test_an_online_learner_trains_and_saves_its_loss(tmp_path: Path) -> None:
    def learner() -> Online:
        model, loss = Net(), Scaled()
        return Online(model, loss, sgd([*model.parameters(), *loss.parameters()]), tbptt.TBPTT(2, 2), lanes=2)

    rows = torch.randn(12, 2, 2)
    whole = learner()
    whole.learn_many(rows[:6], rows[:6])
    whole.save(tmp_path)
    rest = learner()
    rest.load(tmp_path)
    assert not torch.equal(rest.loss.module.scale, Scaled().scale)
    for each in (whole, rest):
        torch.manual_seed(3)
        each.learn_many(rows[6:], rows[6:])
    assert equal(rest.loss.module.state_dict(), whole.loss.module.state_dict())


def test_going_back_takes_the_loss_along() -> None:
    class BackAt(tbptt.SpikeRollback):
        calls = 0

        def __call__(self, estimate: Any) -> Any:
            self.calls += 1
            return tbptt.guards.base.RollBack("it is told") if self.calls == 6 else estimate

    before = own(with_loss())
    run = with_loss(guards=[BackAt()])
    run.run(updates=6)
    assert torch.equal(own(run)["scale"], before["scale"])


def test_each_racer_has_a_copy_of_the_loss_tied_to_its_own_model() -> None:
    model = Net()
    loss = Scaled(tied=model.head.weight)
    first, second = (runner(model, loss) for _ in range(2))
    for each in (first, second):
        assert each.loss.module.tied is each.model.head.weight
        assert each.loss.module.scale is not loss.scale
    assert first.loss.module.scale is not second.loss.module.scale
    held = [each for group in first.updater.optimizer.param_groups for each in group["params"]]
    assert any(each is first.loss.module.scale for each in held)
    assert sum(each is first.model.head.weight for each in held) == 1


def test_compare_leaves_the_loss_as_it_was() -> None:
    model, loss = Net(), Scaled()
    before = {name: each.clone() for name, each in loss.state_dict().items()}
    found = compare(
        [tbptt.TBPTT(4, 4)], model, stream(400), loss=loss, optimizer=sgd, updates=5, points=2, span=8, burn_in=8
    )
    assert found.rows[0].failed == ""
    assert equal(loss.state_dict(), before)
    assert loss.training


@pytest.mark.parametrize(
    "guard", [tbptt.AdaptiveClip(0.01), tbptt.ZClip(warm_up=2), tbptt.ClipNorm(0.01)], ids=["agc", "zclip", "norm"]
)
def test_guards_see_the_gradients_of_the_loss(guard: tbptt.Guard) -> None:
    run = with_loss(guards=[guard])
    before = own(run)["scale"]
    run.run(updates=6)
    assert not torch.equal(own(run)["scale"], before)


class TwoHeads(Net):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 2)


@pytest.mark.parametrize("estimator", [tbptt.TBPTT(8, 8), tbptt.TBPTT(8, 20, replay="retain")], ids=str)
def test_what_has_no_gradient_is_left_alone(tmp_path: Path, estimator: tbptt.Estimator) -> None:
    """Weight decay included, as in a plain loop, with all guards and monitors looking on."""
    model = TwoHeads()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    guards = [tbptt.NonFinite(), tbptt.SpikeRollback(), tbptt.AdaptiveClip(), tbptt.ZClip(), tbptt.ClipNorm(1.0)]
    settings: dict[str, Any] = {"guards": guards, "directory": tmp_path, "saving": tbptt.Saving(log_every=1)}
    tbptt.Trainer(model, nn.MSELoss(), adamw, estimator, stream(), checked=False, **settings).run(updates=12)
    moved = {name for name, each in model.state_dict().items() if not torch.equal(each, before[name])}
    assert moved == {name for name in before if not name.startswith("unused")}


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.core = nn.Embedding(30, 8), nn.LSTM(8, 8)

    def forward(self, inputs: Tensor, state: Any = None) -> Any:
        return self.core(self.embed(inputs), state)


class Adaptive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.soft = nn.AdaptiveLogSoftmaxWithLoss(8, 30, cutoffs=[10])

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -self.soft(outputs.flatten(0, 1), targets.flatten()).output.view(targets.shape)


def test_an_adaptive_softmax_is_trained_as_in_a_plain_loop() -> None:
    """With the optimizer over model and loss, of which each parameter moves as plain autograd moves it."""
    text = torch.randint(30, (81,), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    model, loss = Words(), Adaptive()
    plain, plain_loss = copy.deepcopy((model, loss))
    before = [each.clone() for each in loss.parameters()]
    source = tbptt.ArrayStream(text[:-1], text[1:], lanes=2)
    tbptt.Trainer(
        model, loss, sgd([*model.parameters(), *loss.parameters()]), tbptt.TBPTT(8, 8), source, checked=False
    ).run(passes=1)
    optimizer, state = sgd([*plain.parameters(), *plain_loss.parameters()]), None
    inputs, targets = text[:-1].view(2, -1).T, text[1:].view(2, -1).T
    for begin in range(0, 40, 8):
        outputs, state = plain(inputs[begin : begin + 8], state)
        optimizer.zero_grad()
        plain_loss(outputs, targets[begin : begin + 8]).mean().backward()
        optimizer.step()
        state = tuple(each.detach() for each in state)
    for one, other in ((model, plain), (loss, plain_loss)):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(not torch.equal(a, b) for a, b in zip(loss.parameters(), before, strict=True))


@pytest.mark.parametrize("who", ["trainer", "online"])
def test_several_processes_are_refused(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="this is one of 2") as caught:
        WHO[who](Net())
    assert "lightning" in caught.value.fix
    assert "Accelerate" in caught.value.fix
    model, estimator = Net(), tbptt.TBPTT(8, 8)  # the bare estimator goes on
    estimator.estimate(model, nn.MSELoss(), estimator.init(model, 2), stream().read(8))


def test_torch_distributed_says_how_many_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(ConfigError, match="since tbptt train does not sum gradients over ranks, but this is one of 4"):
        refuse_ranks("tbptt train")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    refuse_ranks("tbptt train")


class TwoRanks:
    """This rank and another one, whose state is broken or not."""

    def __init__(self, other: bool) -> None:
        self.other = other

    def reduce(self, estimate: tbptt.Estimate) -> tbptt.Estimate:
        return estimate.with_gradients({name: each * torch.nan for name, each in estimate.gradients.items()})

    def any(self, flag: bool) -> bool:
        return flag or self.other


@pytest.mark.parametrize("other", [True, False])
def test_ranks_keep_the_carry_or_leave_it_together(other: bool) -> None:
    model, source = Net(), stream()
    guards = [tbptt.NonFinite("skip")]
    updater = Updater(
        model,
        StepLoss.of(nn.MSELoss()),
        sgd(model.parameters()),
        tbptt.TBPTT(8, 8),
        2,
        guards=guards,
        ranks=TwoRanks(other),
    )
    found = updater.update(source.read(8))
    assert (found.applied, found.carried_on, updater.carry.state is None) == (False, not other, other)
    assert bool(updater.snapshots.with_resets(source.read(8)).resets) == other
