"""What a check found, as a person reads it."""

from __future__ import annotations

from dataclasses import dataclass

from tbptt.errors import CheckError

__all__ = ["CheckItem", "CheckReport"]


@dataclass(frozen=True)
class CheckItem:
    """One question put to a model, and the answer.

    Args:
        name: the question.
        passed: the answer.
        detail: what was measured, against what.
        cause: for a failure: the fault, as far as it is known.
        fix: for a failure: what to do.
    """

    name: str
    passed: bool
    detail: str
    cause: str = ""
    fix: str = ""


@dataclass(frozen=True)
class CheckReport:
    """What `tbptt.check` found; true where the model passed everything.

    Args:
        model: the name of the model's class.
        items: the answers, in the order asked.
    """

    model: str
    items: tuple[CheckItem, ...]

    def __bool__(self) -> bool:
        return all(item.passed for item in self.items)

    def __str__(self) -> str:
        lines = [f"tbptt check: {self.model}"]
        for item in self.items:
            lines.append(f"  {'OK  ' if item.passed else 'FAIL'}  {item.name:<18} {item.detail}")
            lines += [f"        {word}: {text}" for word, text in (("cause", item.cause), ("fix", item.fix)) if text]
        lines.append("it carries its state" if self else "it does not carry its state as it should: do not train it")
        return "\n".join(lines)

    def raise_if_failed(self) -> None:
        """Refuse the model unless it passed.

        Raises:
            CheckError: naming every fault that was found.
        """
        failed = [item for item in self.items if not item.passed]
        if failed:
            causes = "; ".join(f"{item.name}: {item.cause} ({item.detail})" for item in failed)
            raise CheckError(
                f"{self.model} was expected to carry its state from window to window, but fails {causes}",
                fix=failed[0].fix,
            )
