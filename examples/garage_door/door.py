"""A garage door. The motor is a small file in the directory $GARAGE_STATE; the rest is as a real one would be."""

import json
import os
import time
from pathlib import Path
from typing import Literal

from device_agent import Agent, CommandFailed, Context

TRAVEL = 0.2  # seconds at speed 1; a real door takes ten
STATE = Path(os.environ.get("GARAGE_STATE", "garage-state")) / "door.json"

agent = Agent()

Position = Literal["open", "closed"]


# Not safe to repeat: after a fault somebody should look before the door moves again.
@agent.command("door.open", idempotent=False)
def open_door(context: Context, speed: int = 1) -> dict[str, str]:
    """Open the door; `speed` is 1 to 3."""
    return _move("open", speed, context)


@agent.command("door.close", idempotent=False)
def close_door(context: Context, speed: int = 1) -> dict[str, str]:
    """Close the door; `speed` is 1 to 3."""
    return _move("closed", speed, context)


@agent.command("door.state", idempotent=True)
def door_state() -> dict[str, str]:
    """Tell where the door is."""
    return {"door": _position()}


@agent.command("door.stuck")
def stuck() -> None:
    """Fail, as a door with something in its way does."""
    raise CommandFailed("the door is stuck: something blocks the light barrier")


def _move(target: Position, speed: int, context: Context) -> dict[str, str]:
    if not 1 <= speed <= 3:
        raise CommandFailed(f"speed must be 1 to 3, not {speed}")
    before = _position()
    if before != target or not STATE.exists():
        context.progress("moving")
        time.sleep(TRAVEL / speed)
        _store(target)
        agent.publish("door", {"door": target})
    return {"door": target, "was": before}


def _position() -> str:
    try:
        return str(json.loads(STATE.read_text())["door"])
    except FileNotFoundError:
        return "closed"


def _store(position: Position) -> None:
    STATE.parent.mkdir(parents=True, exist_ok=True)
    new = STATE.with_suffix(".new")
    new.write_text(json.dumps({"door": position}))
    new.replace(STATE)
