"""Broker accounts that may do everything on the vhost `devices`. All raise `httpx.HTTPError`."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from api.operator.stack import Stack
from topology import access, names


@dataclass(frozen=True, slots=True)
class Account:
    """An internal account of the broker."""

    name: str
    password: str


def make(management_url: str, admin_password: str, name: str, tags: str = "") -> Account:
    """One that goes with its node."""
    made = Account(name, secrets.token_urlsafe(32))
    with httpx.Client(base_url=management_url, auth=(access.ADMIN, admin_password)) as http:
        http.put(f"/api/users/{name}", json={"password": made.password, "tags": tags}).raise_for_status()
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        http.put(f"/api/permissions/{names.VHOST}/{name}", json=everything).raise_for_status()
    return made


@contextmanager
def account(stack: Stack, name: str, tags: str = "") -> Iterator[Account]:
    """One for as long as it is needed: a node that finds an account which isn't the fabric's does not start again."""
    assert stack.broker is not None
    url, admin = stack.settings.management_url, stack.broker.password(access.ADMIN)
    made = make(url, admin, name, tags)
    try:
        yield made
    finally:
        with httpx.Client(base_url=url, auth=(access.ADMIN, admin)) as http:
            http.delete(f"/api/users/{name}").raise_for_status()
