"""Devices as operators see them: made, looked at, changed, deleted."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fabric.clock import Clock
from fabric.errors import Conflict, Invalid, NotFound, Temporary
from fabric.identity.enrollment import Enrollment, Invitation
from fabric.identity.revocation import Revocation
from fabric.model import Device, Mailbox
from fabric.ports import Publisher, Registry
from fabric.waiting import announce
from topology import layout, names
from topology.names import DeviceId

log = logging.getLogger(__name__)

MAX_GROUPS = 32
MAX_LABELS = 32
MAX_LABEL = 256  # characters of a label's value


@dataclass(frozen=True, slots=True)
class Patch:
    """What to change; None leaves a field as it is. `groups` is replaced whole; a label of None is removed;
    a backlog of `default` is the fabric's."""

    enabled: bool | None = None
    groups: tuple[str, ...] | None = None
    labels: Mapping[str, str | None] | None = None
    backlog: int | Literal["default"] | None = None


class Devices:
    """`cell` is where new devices live; no device may have a larger backlog than `largest_backlog`."""

    def __init__(
        self,
        registry: Registry,
        publisher: Publisher,
        enrollment: Enrollment,
        revocation: Revocation,
        clock: Clock,
        cell: str,
        largest_backlog: int,
    ) -> None:
        self._registry, self._publisher = registry, publisher
        self._enrollment, self._revocation = enrollment, revocation
        self._clock, self._cell, self._largest_backlog = clock, cell, largest_backlog

    async def create(
        self, id: DeviceId, groups: tuple[str, ...], labels: Mapping[str, str], backlog: int | None = None
    ) -> tuple[Device, Invitation]:
        """A new device with its mailbox, and the invitation to enroll it.

        The mailbox of an earlier device of that id is dropped first, with what it holds.

        Raises:
            Invalid: groups, labels or backlog out of bounds.
            Conflict: the id is taken.
            Temporary: the broker or the ledger is away; nothing was made.
        """
        _check(groups, labels)
        self._check_backlog(backlog)
        if await self._registry.device(id) is not None:
            raise Conflict(f"there is a device {id} already")
        await self._publisher.delete_queue(names.mailbox(id))
        await self._publisher.declare(layout.mailbox(id), [layout.mailbox_binding(id)])
        invitation, code = self._enrollment.invite(id)
        fresh = Device(
            id, self._cell, 1, groups, labels, enabled=True, created_at=self._clock.now(), version=1, backlog=backlog
        )
        return await self._registry.create_device(fresh, code), invitation

    async def get(self, id: DeviceId) -> tuple[Device, Mailbox]:
        """Raises `NotFound`."""
        device = await self._registry.device(id)
        if device is None:
            raise NotFound(f"there is no device {id}")
        return device, await self._registry.mailbox(id)

    async def list(self, after: DeviceId | None, limit: int) -> list[Device]:
        return await self._registry.devices(after, limit)

    async def patch(self, id: DeviceId, patch: Patch, expected_version: int | None) -> Device:
        """Raises `NotFound`, `Invalid`, `PreconditionFailed`. Disabling closes the device's connections."""
        device, _ = await self.get(id)
        labels = dict(device.labels)
        for name, value in (patch.labels or {}).items():
            if value is None:
                labels.pop(name, None)
            else:
                labels[name] = value
        changed = replace(
            device,
            enabled=device.enabled if patch.enabled is None else patch.enabled,
            groups=device.groups if patch.groups is None else patch.groups,
            labels=labels,
            backlog=_patched(patch.backlog, device.backlog),
        )
        _check(changed.groups, labels)
        if patch.backlog is not None:
            self._check_backlog(changed.backlog)
        # Without the caller's If-Match, what was just read still guards against a concurrent change.
        updated = await self._registry.update_device(changed, expected_version or device.version)
        if device.enabled and not updated.enabled:
            await self._revocation.cut(id)
        return updated

    async def delete(self, id: DeviceId, expected_version: int | None) -> None:
        """Settle what is open, forget keys and mail, and close the device's connections.

        Raises `NotFound`, `PreconditionFailed`.
        """
        settled = await self._registry.delete_device(id, expected_version, self._clock.now())
        await self._revocation.cut(id)
        for command in settled:
            await announce(self._publisher, command)
        try:
            await self._publisher.delete_queue(names.mailbox(id))
        except Temporary as error:
            # Whoever makes a device of this id drops the mailbox before.
            log.warning("mailbox.undeleted device=%s error=%s", id, error)

    async def invite(self, id: DeviceId) -> Invitation:
        """A new enrollment code, which voids the open ones. Raises `NotFound`."""
        invitation, code = self._enrollment.invite(id)
        await self._registry.add_code(code)
        return invitation

    def _check_backlog(self, backlog: int | None) -> None:
        if backlog is not None and not 1 <= backlog <= self._largest_backlog:
            raise Invalid(
                f"a mailbox's limit is 1 to {self._largest_backlog}; the setting 'largest_backlog' can raise that"
            )


def _patched(wanted: int | Literal["default"] | None, present: int | None) -> int | None:
    if wanted is None:
        return present
    return None if wanted == "default" else wanted


def _check(groups: tuple[str, ...], labels: Mapping[str, str]) -> None:
    if len(groups) > MAX_GROUPS or len(set(groups)) != len(groups):
        raise Invalid(f"a device has at most {MAX_GROUPS} groups, each once")
    for group in groups:
        if not names.is_dotted(group):
            raise Invalid("a group is dot-separated words of a-z, 0-9, '_' and '-', 128 characters at most")
    if len(labels) > MAX_LABELS:
        raise Invalid(f"a device has at most {MAX_LABELS} labels")
    for name, value in labels.items():
        if not names.is_dotted(name) or len(value) > MAX_LABEL or not value.isprintable():
            raise Invalid(f"a label has a dotted name and a printable value of at most {MAX_LABEL} characters")
