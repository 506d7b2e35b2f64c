"""What a check found, as a person and as a program reads it."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tbptt.errors import CheckError

__all__ = ["CheckItem", "CheckReport"]


@dataclass(frozen=True)
class CheckItem:
    """One question put to a model, and the answer.

    Args:
        name: the question.
        verdict: "ok"; "note", for a limit that the model itself speaks of (it raises), or what is good to know, or a
            failure that is accepted; or "fail".
        detail: what was measured, against what.
        cause: for a failure: the fault, as far as it is known.
        fix: for a failure: what to do, as code.
        measured: the numbers, by what was tried; a text where the model refused.
    """

    name: str
    verdict: Literal["ok", "note", "fail"]
    detail: str
    cause: str = ""
    fix: str = ""
    measured: Mapping[str, float | str] = field(default_factory=dict[str, "float | str"])

    @property
    def passed(self) -> bool:
        """Whether the model may be trained, as far as this question goes."""
        return self.verdict != "fail"


@dataclass(frozen=True)
class CheckReport:
    """What `tbptt.check` found; true where the model passed everything.

    It prints as a page of text, and shows as a table in a notebook.

    Args:
        model: the name of the model's class.
        tried: what it was tried on.
        items: the answers, in the order asked.
    """

    model: str
    tried: str
    items: tuple[CheckItem, ...]

    def __bool__(self) -> bool:
        return all(item.passed for item in self.items)

    @property
    def conclusion(self) -> str:
        """The answer in one sentence."""
        if not self:
            return "it does not carry its state as it should: do not train it"
        limits = [item.name for item in self.items if item.verdict == "note"]
        return f"it carries its state, within the limits noted under {', '.join(limits)}" if limits else _GOOD

    def __str__(self) -> str:
        lines = [f"tbptt check: {self.model}", f"  tried on {self.tried}"]
        for item in self.items:
            lines.append(f"  {item.verdict.upper():<4}  {item.name:<18} {item.detail}")
            lines += [f"        {word}: {text}" for word, text in (("cause", item.cause), ("fix", item.fix)) if text]
        lines.append(self.conclusion)
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the report as one JSON object: model, passed, tried, conclusion, and the items."""
        return json.dumps(
            {
                "model": self.model,
                "passed": bool(self),
                "tried": self.tried,
                "conclusion": self.conclusion,
                "items": [_as_dict(item) for item in self.items],
            },
            indent=2,
        )

    def _repr_html_(self) -> str:
        """Return the report as a notebook shows it."""
        rows = "".join(
            f"<tr><td><b>{item.verdict.upper()}</b></td><td>{html.escape(item.name)}</td><td>"
            + "<br>".join(html.escape(text) for text in (item.detail, item.cause) if text)
            + (f"<br><code>{html.escape(item.fix)}</code>" if item.fix else "")
            + "</td></tr>"
            for item in self.items
        )
        head = f"<b>tbptt check: {html.escape(self.model)}</b>, tried on {html.escape(self.tried)}"
        return f"<p>{head}</p><table>{rows}</table><p>{html.escape(self.conclusion)}</p>"

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


_GOOD = "it carries its state"


def _as_dict(item: CheckItem) -> dict[str, Any]:
    return {
        "name": item.name,
        "verdict": item.verdict,
        "detail": item.detail,
        "cause": item.cause,
        "fix": item.fix,
        # JSON has no NaN and no infinity: what is no number is written as its name
        "measured": {k: v if not isinstance(v, float) or v - v == 0 else str(v) for k, v in item.measured.items()},
    }
