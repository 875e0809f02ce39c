"""Old commands go while the gateway goes on accepting: a real worker, on both databases."""

import threading

import httpx

from tests.harness.stack import RunningStack, eventually
from tests.integration.sql.values import execute, rows

DAYS_31 = 31 * 86_400_000_000  # microseconds


def test_old_commands_go_while_new_ones_are_accepted(own_stack: RunningStack) -> None:
    url = own_stack.stack.settings.database
    devices = [own_stack.create_device()[0] for _ in range(6)]
    old = [own_stack.send(device, "note", {}, ttl=2)["id"] for device in devices for _ in range(8)]
    waiting = own_stack.send(devices[0], "note", {}, ttl=604_800)["id"]
    recent = own_stack.send(devices[1], "note", {}, ttl=1)["id"]
    for id in (old[-1], recent):
        assert own_stack.settled(id)["state"] == "expired"
    named = ", ".join(f"'{id}'" for id in old)
    open_ones = f"SELECT 1 FROM commands WHERE id IN ({named}) AND settled_at IS NULL"
    eventually(lambda: not rows(url, open_ones), "all have expired")
    set_back = ", ".join(f"{time} = {time} - {DAYS_31}" for time in ("accepted_at", "deadline", "settled_at"))
    with Sender(own_stack, devices[2]) as sender:
        execute(url, f"UPDATE commands SET {set_back} WHERE id IN ({named})")
        eventually(
            lambda: not rows(url, f"SELECT 1 FROM commands WHERE id IN ({named})"), "the old ones are gone", within=40
        )
        sent = sender.accepted
        eventually(lambda: sender.accepted >= sent + 20, "the gateway accepts")
    assert sender.refused == []
    for id in (old[0], old[-1]):
        assert own_stack.http.get(f"/v1/commands/{id}").status_code == 404
    assert own_stack.command(waiting)["state"] == "queued"
    assert own_stack.command(recent)["state"] == "expired"
    assert not rows(url, f"SELECT 1 FROM events WHERE command IN ({named})")
    (pruned,) = rows(url, "SELECT value FROM meta WHERE name = 'pruned_through'")
    assert int(pruned.value) > len(old)


class Sender:
    """Sends a command every 20 ms, from a thread of its own; each is to be accepted."""

    def __init__(self, running: RunningStack, device: str) -> None:
        self._running, self._device = running, device
        self.accepted = 0
        self.refused: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> "Sender":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(30)

    def _send(self) -> None:
        with self._running.client(self._running.token) as http:
            while not self._ended.wait(0.02):
                answer = self._post(http)
                if answer.is_success:
                    self.accepted += 1
                else:
                    self.refused.append(f"{answer.status_code} {answer.text}")

    def _post(self, http: httpx.Client) -> httpx.Response:
        body = {"name": "note", "args": {}, "ttl": 0.3}
        return http.post(f"/v1/devices/{self._device}/commands", json=body)
