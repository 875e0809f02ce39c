"""Where the parts of a stack are that `restante up` runs: it has chosen their ports."""

import json
from dataclasses import fields, replace
from typing import Final

from api.operator.setup import Files
from api.settings import Settings

PLACES: Final = ("api_url", "amqps_url", "amqp_host", "amqp_port", "management_url", "auth_host", "auth_port")


def as_running(settings: Settings) -> Settings:
    """The settings, with what the stack of the state directory says of its places wherever nothing else was set."""
    try:
        said = json.loads(Files(settings.state_dir).stack.read_text())
    except (OSError, ValueError):
        return settings
    known = {**said, **said.get("inside", {})}
    defaults = {each.name: each.default for each in fields(Settings)}
    unset = [name for name in PLACES if name in known and getattr(settings, name) == defaults[name]]
    return replace(settings, **{name: known[name] for name in unset})
