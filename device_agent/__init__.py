"""The agent that runs on a device: one outbound connection, a mailbox, handlers, telemetry."""

from device_agent.agent import Agent
from device_agent.context import Context
from device_agent.errors import AgentError
from device_agent.handlers import CommandFailed, Result

__all__ = ["Agent", "AgentError", "CommandFailed", "Context", "Result"]
