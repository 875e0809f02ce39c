"""New keys for old: a device registers its next key with a token of the present one.

The old key stays good beside the new one until the device drops it, so there is no moment without a key.
"""

from collections.abc import Mapping

from fabric.clock import Clock
from fabric.identity import proofs
from fabric.identity.keys import accept_jwk
from fabric.model import DeviceKey
from fabric.ports import Registry
from topology import enrollment
from topology.names import DeviceId


class Rotation:
    """Args:
    registry: holds the keys; it checks once more that the old one is good, in the transaction.
    """

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self._registry, self._clock = registry, clock

    async def add(
        self, device: DeviceId, parent: str, given_key: Mapping[str, object], proof: str
    ) -> tuple[DeviceKey, bool]:
        """Register a key under `parent`, the kid of the token that asks; False when it was registered before.

        Raises:
            Invalid: the key or the proof is not of the right form, or the proof does not hold.
            Unauthenticated: the device is suspended or gone, or the parent is.
            Conflict: there are as many active keys as may be, or the key was retired or is another device's.
        """
        jwk = accept_jwk(given_key)
        proofs.check(proof, jwk, enrollment.KEY_PROOF_TYPE, {"device": device, "parent": parent}, self._clock)
        return await self._registry.add_key(
            DeviceKey(device, enrollment.thumbprint(jwk), jwk, self._clock.now(), parent=parent)
        )
