"""What became of an authority: asked of a service whose certificate another one issued.

A device that was away while the authority was replaced can't verify the service any more. What it is told over a
connection that it can't verify either, and that carries nothing of it, is signed by the authority that it trusts.
"""

import http.client
from collections.abc import Sequence

from device_agent import errors, https, tls
from topology import enrollment

PATH = "/v1/authority/successors"


def ask(service: https.Service) -> Sequence[str]:
    """The announcements of the service's authorities, to be followed from the one that is trusted.

    Raises:
        errors.BadAnswer, errors.Unreachable
    """
    status, body = https.exchange(service, tls.unverified(), "GET", PATH)
    answer = https.json_object(body) if status == http.client.OK else None
    told = None if answer is None else answer.get("announcements")
    if not isinstance(told, list) or not all(isinstance(text, str) for text in told):
        raise errors.BadAnswer(f"{service.url}{PATH} answered {status}, and not with announcements")
    if len(told) > enrollment.MAX_ANNOUNCEMENTS:
        raise errors.BadAnswer(f"{service.url}{PATH} answered with more than {enrollment.MAX_ANNOUNCEMENTS} of them")
    return told
