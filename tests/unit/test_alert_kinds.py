"""The table of kinds is true: each is raised and ended somewhere, and nothing is raised that is not in it."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import backup_worker
from backup_worker.alerts import kinds

PACKAGE = Path(backup_worker.__file__).parent
NOTICES = {name for name, kind in kinds.KINDS.items() if kind.once or "notice" in kind.ends}


class Calls(ast.NodeVisitor):
    """Collects the kinds of the keys that a module raises and resolves."""

    def __init__(self, module: ast.Module) -> None:
        self.raised: set[str] = set()
        self.ended: set[str] = set()
        self.unclear: list[int] = []
        self._texts: defaultdict[str, set[str]] = defaultdict(set)
        for node in ast.walk(module):
            if isinstance(node, ast.Assign) and (text := _text(node.value)) is not None:
                self._note(node.targets, text)
            elif isinstance(node, ast.AnnAssign) and node.value and (text := _text(node.value)) is not None:
                self._note([node.target], text)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                for target in node.targets:
                    if isinstance(target, ast.Tuple):
                        for one, value in zip(target.elts, node.value.elts, strict=False):
                            if (text := _text(value)) is not None:
                                self._note([one], text)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.BoolOp):
                for value in node.value.values:
                    if (text := _text(value)) is not None:
                        self._note(node.targets, text)
        self._function: list[ast.FunctionDef] = []
        self.visit(module)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._function.append(node)
        self.generic_visit(node)
        self._function.pop()

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        match node.func:
            case ast.Attribute(attr="alert" | "resolve" as what, value=owner) if (
                "runtime" in ast.unparse(owner).lower()
            ):
                self._take(node, self.raised if what == "alert" else self.ended, is_end=what == "resolve")
            case ast.Name(id="Alert") | ast.Attribute(attr="Alert"):
                self._take(node, self.raised, is_end=False)

    def _take(self, node: ast.Call, found: set[str], *, is_end: bool) -> None:
        keys = [word.value for word in node.keywords if word.arg == "key"]
        key = node.args[0] if node.args else keys[0]
        if isinstance(key, ast.Starred):  # one that was told before, read back
            return
        names = set(self._kinds_of(key)) - {""}
        if not names and is_end and self._function:
            # A loop over the open alerts: the kinds that it means are named around it.
            words = {one.value for one in ast.walk(self._function[-1]) if isinstance(one, ast.Constant)}
            names = {word for word in words if word in kinds.KINDS}
        if names:
            found |= names
        elif not is_end and ast.unparse(key) != "key":  # the runtime itself passes its argument on
            self.unclear.append(node.lineno)

    def _kinds_of(self, key: ast.expr) -> Iterator[str]:
        text = _text(key)
        texts = {text} if text is not None else self._texts[ast.unparse(key)]
        yield from (kinds.name_of(one) for one in texts)

    def _note(self, targets: list[ast.expr], text: str) -> None:
        for target in targets:
            self._texts[ast.unparse(target)].add(text)


def _text(value: ast.expr) -> str | None:
    """Return a text as far as it stands in the source: the beginning of one with braces."""
    match value:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]) if "/" in text:
            return text
    return None


@pytest.fixture(scope="module")
def calls() -> dict[str, Calls]:
    files = sorted(PACKAGE.rglob("*.py"))
    return {str(path.relative_to(PACKAGE)): Calls(ast.parse(path.read_text())) for path in files}


def test_every_alert_that_is_raised_is_in_the_table(calls: dict[str, Calls]) -> None:
    unclear = {path: one.unclear for path, one in calls.items() if one.unclear}
    assert not unclear, "a key whose kind cannot be read from the source"
    raised = {name: path for path, one in calls.items() for name in one.raised}
    assert {name: path for name, path in raised.items() if name not in kinds.KINDS} == {}


@pytest.mark.parametrize("name", kinds.KINDS)
def test_every_kind_in_the_table_is_raised_somewhere(name: str, calls: dict[str, Calls]) -> None:
    assert [path for path, one in calls.items() if name in one.raised]


@pytest.mark.parametrize("name", [name for name in kinds.KINDS if name not in NOTICES])
def test_every_kind_that_lasts_is_ended_somewhere(name: str, calls: dict[str, Calls]) -> None:
    assert [path for path, one in calls.items() if name in one.ended]


def test_the_issue_s_kinds_are_all_there() -> None:
    wanted = {
        "failed", "suspect", "missing", "stale", "rot", "drill", "recovery", "escalation", "dead-letter", "lag",
        "unapproved", "space", "memory", "config", "stuck",
    }  # fmt: skip
    assert wanted <= kinds.KINDS.keys()


@pytest.mark.parametrize(
    ("key", "agent", "command"),
    [
        ("missing/daily/z", "z", "backup-worker list --agent z --tier daily"),
        ("missing/daily/z", None, "backup-worker list --agent z --tier daily"),
        ("rot/daily/2026-11-23/z", "z", "backup-worker verify daily/2026-11-23/z"),
        ("drill/z", "z", "backup-worker drill z"),
        ("space", None, "backup-worker doctor"),
        ("never-heard-of/it", None, "backup-worker alerts"),
    ],
)
def test_each_alert_knows_the_command_to_look_at_it(key: str, agent: str | None, command: str) -> None:
    assert kinds.of(key).command(key, agent) == command


def test_the_anchor_in_the_runbook_is_the_kind() -> None:
    assert kinds.of("missing/daily/z").link() == "docs/runbook.md#missing"
    assert kinds.of("lag").link("https://example.com/book") == "https://example.com/book#lag"
