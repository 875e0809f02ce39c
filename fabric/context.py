"""What log lines are about beside their own words; each task has its own, and those that it starts begin with it."""

from contextvars import ContextVar

from topology.names import CommandId

command: ContextVar[CommandId | None] = ContextVar("command", default=None)
"""The command that is dealt with."""
