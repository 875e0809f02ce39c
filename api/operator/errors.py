"""The errors whose text is meant for the person at the terminal: one sentence, no traceback."""

from api.operator.archive import BackupFailed
from api.operator.authority import AuthorityError
from api.operator.client import CallFailed
from api.operator.node import NodeError
from api.operator.processes import MissingToolError
from api.operator.sockets import NoWayError
from api.operator.userland import UserlandError
from fabric.errors import FabricError

KNOWN_ERRORS = (
    FabricError,
    AuthorityError,
    BackupFailed,
    CallFailed,
    NodeError,
    MissingToolError,
    NoWayError,
    UserlandError,
)
