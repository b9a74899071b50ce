"""Where an agent that we start finds Redis, and as whom: by itself the worker's own address, with all its rights.

With `agent_redis` in the schedule an agent gets a URL of its own, and so the rights of its own user under
`em-bridge acl`. The password is read when the agent is started: an exchanged one counts from the next start on.
Raises AgentBackupError if there is none; the worker's address is never given instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

from backup_worker.config import Config
from em_bridge.acl import AGENT, user_name
from em_bridge.errors import AgentBackupError
from em_bridge.events import EM


def redis_url_of(agent: str, config: Config, ours: str) -> str:
    """Return the URL that `agent` gets as REDIS_URL; `ours` is the worker's."""
    wanted = config.schedule.agent_redis
    if wanted is None:
        return ours
    user = user_name(EM if agent.lower() == EM else AGENT, agent)
    url = wanted.url.replace("{user}", user)
    if "{password}" not in url or wanted.passwords is None:
        return url
    return url.replace("{password}", quote(_password(user, wanted.passwords), safe=""))


def _password(user: str, path: Path) -> str:
    hint = f"`em-bridge acl --passwords {path}` writes it; the worker must be able to read it"
    try:
        known = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise AgentBackupError(
            f"the passwords of agents in “{path}” cannot be read: {reason.lower()}", hint=hint
        ) from None
    word = known.get(user) if isinstance(known, dict) else None
    if not isinstance(word, str) or not word:
        raise AgentBackupError(f"“{path}” holds no password of the user “{user}”", hint=hint)
    return word
