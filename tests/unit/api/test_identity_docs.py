"""The table of scopes in docs/identity.md says what the guards do."""

import re
from collections import defaultdict
from pathlib import Path

from fastapi.routing import APIRoute

from api.callers import Requires
from api.routes import ROUTERS
from fabric.audit import Action
from fabric.identity.scopes import NARROWED, Narrowing

PAGE = (Path(__file__).parents[3] / "docs" / "identity.md").read_text(encoding="utf-8")
_, RIGHTS, *_ = PAGE.split("\n## ")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in RIGHTS.splitlines() if line.startswith("| `")]
TO = {
    "": Narrowing.NOT,
    "group": Narrowing.GROUP,
    "device, group": Narrowing.DEVICE,
    **{f"device, group, {name}": Narrowing.NAME for name in ("name", "subject", "channel")},
}


def test_the_table_has_each_scope_and_how_far_it_can_be_narrowed() -> None:
    assert {scope.strip("`"): TO[narrowed] for scope, narrowed, _ in ROWS} == NARROWED


def test_the_table_has_each_guarded_operation() -> None:
    guarded = defaultdict(set)
    for route in (route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)):
        (guard,) = [each.call for each in route.dependant.dependencies]
        for action in guard.actions if isinstance(guard, Requires) else ():
            guarded[action] |= {f"{method} {route.path}" for method in route.methods}
    for scope, _, operations in ROWS:
        action = scope.strip("`")
        if NARROWED[action] is not Narrowing.GROUP:  # those are left to the routes: the groups are in the body
            assert set(re.findall(r"`([^`]+)`", operations)) == guarded[action], action


def test_the_page_has_each_action_of_the_audit() -> None:
    told = PAGE.partition("\n## Audit\n")[2]
    assert [action.value for action in Action if f"`{action.value}`" not in told] == []
