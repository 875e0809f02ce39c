"""Broker accounts for one run alone: the node goes when the run ends."""

import httpx

from topology import access, names


def make(management_url: str, admin_password: str, name: str, password: str, tags: str = "") -> None:
    """One that may do everything on the vhost `devices`."""
    with httpx.Client(base_url=management_url, auth=(access.ADMIN, admin_password)) as http:
        http.put(f"/api/users/{name}", json={"password": password, "tags": tags}).raise_for_status()
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        http.put(f"/api/permissions/{names.VHOST}/{name}", json=everything).raise_for_status()
