"""What the demo says, and what it found: each step a record with `ok`, its seconds and its figures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.rule import Rule

from em_bridge import clock
from em_bridge.errors import AgentBackupError


class StepFailed(AgentBackupError):
    """Something in the demo did not turn out as promised."""


@dataclass
class Step:
    """One step of the demo. `facts` are its figures."""

    step: str
    ok: bool = False
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def check(self, holds: bool, what: str) -> None:
        """Raise StepFailed with `what` unless `holds`."""
        if not holds:
            raise StepFailed(what)


@dataclass
class Show:
    """Prints steps as they happen on `console` and keeps them."""

    console: Console
    steps: list[Step] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Run one step: an AgentBackupError inside fails it and ends the demo."""
        step = Step(title)
        self.steps.append(step)
        self.console.print()
        self.console.print(Rule(f"[bold]{len(self.steps)}. {title}[/]", align="left"))
        begun = clock.monotonic()
        try:
            yield step
            step.ok = True
        except AgentBackupError as error:
            step.error = error.message
            raise
        except KeyboardInterrupt:
            step.error = "interrupted"
            raise
        finally:
            step.seconds = round(clock.monotonic() - begun, 2)
            if step.ok:
                self.console.print(f"   [green]✔ done in {step.seconds:.1f} s[/]")
            else:
                self.console.print(f"   [red]✘ {step.error or 'failed'}[/]")

    def say(self, text: str) -> None:
        """Print a line of the present step."""
        self.console.print(f"   {text}")

    def as_json(self) -> list[dict[str, Any]]:
        """Return the steps for `--json`."""
        return [
            {
                "step": one.step,
                "ok": one.ok,
                "seconds": one.seconds,
                **one.facts,
                **({"error": one.error} if one.error else {}),
            }
            for one in self.steps
        ]


def wait_for(what: str, within_s: float, holds: Callable[[], bool]) -> float:
    """Wait until `holds()`; return how many seconds it took. Raises StepFailed after `within_s`."""
    begun = clock.monotonic()
    while not holds():
        if clock.monotonic() - begun > within_s:
            raise StepFailed(f"waited {within_s:.0f} s in vain for {what}")
        clock.sleep(0.05)
    return clock.monotonic() - begun
