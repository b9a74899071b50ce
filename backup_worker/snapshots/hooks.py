"""An agent's own commands around the copying of its files: to flush, to pause, and to go on.

What the first one refuses is not backed up. The second one runs whatever became of the first and of the copying, and
its failure does not take a good copy away: it becomes a warning of the snapshot. Each runs in the agent's root, in a
process group of its own that is killed as a whole at the end of its time; the end of its output is in the message.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator

from backup_worker.snapshots.errors import SnapshotError, from_os_error, printable
from backup_worker.snapshots.scope import AgentFiles, Hook

_SHOWN_BYTES = 2000


@contextlib.contextmanager
def around_backup(agent: AgentFiles, warnings: list[str]) -> Iterator[None]:
    """Run the hooks of `agent` around what happens inside; raises SnapshotError if the first one fails.

    What the second one says in failing is added to `warnings`, or to the error that is under way.
    """
    try:
        if agent.before_backup is not None and (complaint := _complaint(agent, agent.before_backup)):
            raise SnapshotError(
                f"backing up “{agent.name}” failed: before_backup {complaint}",
                hint="see `before_backup` in agents.json; nothing was backed up",
            )
        yield
    except (SnapshotError, OSError) as error:
        if complaint := _after(agent):
            failure = (
                from_os_error(f"backing up “{agent.name}”", error) if isinstance(error, OSError) else error
            )
            raise type(failure)(f"{failure.message}; after_backup {complaint}", hint=failure.hint) from error
        raise
    except BaseException:
        _after(agent)
        raise
    else:
        if complaint := _after(agent):
            warnings.append(f"after_backup {complaint}")


def _after(agent: AgentFiles) -> str | None:
    return _complaint(agent, agent.after_backup) if agent.after_backup is not None else None


def _complaint(agent: AgentFiles, hook: Hook) -> str | None:
    """Run it; return what went wrong, with the end of what it printed, or None."""
    name = f"“{printable(' '.join(hook.command))}”"
    environment = os.environ | {"AGENT_ID": agent.name, "AGENT_ROOT": str(agent.root)}
    with tempfile.TemporaryFile() as output:
        try:
            # In a file: nobody has to read along, and a child that lives on holds no pipe that we would wait for.
            process = subprocess.Popen(
                hook.command, cwd=agent.root, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return f"{name} cannot be run: {(error.strerror or str(error)).lower()}"
        try:
            code = process.wait(hook.timeout_s)
        except subprocess.TimeoutExpired:
            return f"{name} took longer than {hook.timeout_s:g} s{_end_of(output.fileno())}"
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code == 0:
            return None
        how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        return f"{name} {how}{_end_of(output.fileno())}"


def _end_of(fd: int) -> str:
    size = os.fstat(fd).st_size
    text = os.pread(fd, _SHOWN_BYTES, max(0, size - _SHOWN_BYTES)).decode("utf-8", "backslashreplace").strip()
    return f": {printable(text)}" if text else ""
