"""The program of the demo's agents, copied into each root as `agent.py`: it keeps a charter, weights and a memory.

It beats, remembers every message it gets in a SQLite file, and, when it finds a file `orders.json` in its root
(`{"to": "jay", "count": 100, "per_second": 50}`), sends that many numbered messages.
"""

import json
import os
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any

from em_bridge import Agent


def main() -> int:
    """Run until killed; exit 3 if there is no charter to live by."""
    name, root = os.environ["AGENT_ID"], Path(os.environ["AGENT_ROOT"])
    if not (root / "SOUL.md").read_text().strip():
        print("no charter, no life", file=sys.stderr)
        return 3
    weights = json.loads((root / "priority_weights.json").read_text())
    print(f"{name} is up with {len(weights)} weights", flush=True)
    memory = sqlite3.connect(root / "memory" / "memory.db")
    with Agent(name, outbox=root / f"{name}.outbox", heartbeat_s=0.25) as me:
        while True:
            obey(me, root / "orders.json")
            message = me.receive(timeout_s=0.2)
            if message is not None and message.sender == "backup-worker":
                # What it says stands in RECOVERY.md too: from when its state is, and what is lost.
                print(message.payload.decode(), flush=True)
                me.ack(message)
            elif message is not None:
                with memory:
                    heard = (message.sender, message.seq, message.payload.decode())
                    memory.execute("INSERT INTO heard VALUES (?, ?, ?)", heard)
                me.ack(message)


def obey(me: Agent, file: Path) -> None:
    """Take the orders, if there are any, and carry them out in the background."""
    if file.exists():
        orders = json.loads(file.read_text())
        file.unlink()
        threading.Thread(target=talk, args=(me, orders), daemon=True).start()


def talk(me: Agent, orders: dict[str, Any]) -> None:
    """Send numbered messages, at the pace that the orders ask for."""
    for number in range(1, orders["count"] + 1):
        me.send(orders["to"], str(number).encode())
        time.sleep(1 / orders["per_second"])


if __name__ == "__main__":
    sys.exit(main())
