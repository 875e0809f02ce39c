"""The adapter to the broker's management API: the only package that speaks HTTP to the broker."""

from fabric.management.client import ManagementClient

__all__ = ["ManagementClient"]
