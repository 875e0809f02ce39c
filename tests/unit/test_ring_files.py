"""The files of the rings: private, followed while a process runs, and whole wherever a change was interrupted."""

import stat
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from api.operator import rings
from api.operator.authority import AuthorityError
from api.operator.rings import Purpose, RingFiles, Watch
from fabric.clock import Clock
from fabric.errors import Temporary

LEAD, OVERLAP = 120, 1_000


class Interrupted(Exception):
    """The power went off."""


async def _no_offset() -> int:
    return 0


@pytest.fixture(params=list(Purpose))
def files(request: pytest.FixtureRequest, tmp_path: Path) -> RingFiles:
    made = RingFiles(tmp_path, request.param)
    rings.prepare(made, lambda _: None)
    return made


def now() -> int:
    return int(time.time())


def signing(files: RingFiles, at: int) -> str:
    """What a process that starts at that time signs with."""
    return rings.open_keys(files, lambda: at * 1_000_000).signing().kid


def test_everything_is_for_its_owner_only(files: RingFiles, tmp_path: Path) -> None:
    rings.rotate(files, now(), LEAD, OVERLAP)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_setting_up_again_changes_nothing(files: RingFiles) -> None:
    rings.rotate(files, now(), LEAD, OVERLAP)
    before = {path: path.read_bytes() for path in files.state_dir.rglob("*") if path.is_file()}
    rings.prepare(files, lambda _: None)
    assert {path: path.read_bytes() for path in files.state_dir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("adopted", [False, True])
def test_the_one_key_of_yesterday_becomes_the_first_of_a_ring(files: RingFiles, adopted: bool) -> None:
    """Also when that was interrupted after the ring was made."""
    kid = signing(files, now())
    pem = files.pem(kid).read_bytes()
    files.only.write_bytes(pem)
    if not adopted:
        files.ring.unlink()
        files.pem(kid).unlink()
    rings.prepare(files, lambda _: None)
    assert signing(files, now()) == kid
    assert not files.only.exists()


@pytest.mark.parametrize("step", ["pem", "ring", "tidying"])
def test_a_rotation_that_is_interrupted_leaves_one_ring_or_the_other(
    files: RingFiles, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, begin = signing(files, now()), now()

    def interrupted(*given: object) -> None:
        if step == "tidying" or (given[0] == files.ring) == (step == "ring"):
            raise Interrupted

    with monkeypatch.context() as patched:
        name = "_tidy" if step == "tidying" else "replace_private"
        whole = getattr(rings, name)
        patched.setattr(rings, name, lambda *given: (interrupted(*given), whole(*given))[1])
        with pytest.raises(Interrupted):
            rings.rotate(files, begin, LEAD, OVERLAP)
    assert signing(files, begin) == first
    after = begin + LEAD
    assert (signing(files, after) != first) == (step == "tidying")
    if step != "tidying":
        rings.rotate(files, begin, LEAD, OVERLAP)
    assert signing(files, after) == rings.read(files).newest.kid != first
    assert {path.stem for path in files.private.iterdir()} == {key.kid for key in rings.read(files).keys}


def test_private_keys_go_when_they_sign_no_more(files: RingFiles) -> None:
    first = signing(files, now())
    rings.rotate(files, now() - 1_000, LEAD, OVERLAP)
    rings.prepare(files, lambda _: None)
    assert not files.pem(first).exists()
    assert rings.open_keys(files, lambda: now() * 1_000_000).public(first) is not None


def test_a_ring_that_cannot_be_read_says_what_to_do(files: RingFiles) -> None:
    files.ring.write_text("{}")
    with pytest.raises(AuthorityError, match="restante setup"):
        rings.open_keys(files, lambda: 0)
    files.ring.unlink()
    with pytest.raises(AuthorityError, match="restante setup"):
        rings.open_keys(files, lambda: 0)


async def test_a_process_follows_and_keeps_what_it_has_when_it_cannot_read(files: RingFiles) -> None:
    clock = Clock(_no_offset)
    gateway, worker = Watch(files, clock), Watch(files, clock, private=False)
    first = gateway.keys.signing().kid
    rings.rotate(files, now() - 2 * LEAD, LEAD, OVERLAP)
    for watch in (gateway, worker):
        await watch.look()
        assert len(watch.keys.published()["keys"]) == 2
    second = gateway.keys.signing().kid
    assert second != first
    whole = files.ring.read_bytes()
    files.ring.write_bytes(whole[:-10])
    with pytest.raises(Temporary):
        await gateway.look()
    assert gateway.problem
    assert gateway.keys.signing().kid == second
    files.ring.write_bytes(whole)
    await gateway.look()
    assert not gateway.problem


def test_a_retired_key_leaves_nothing_behind(files: RingFiles) -> None:
    first = signing(files, now())
    rings.rotate(files, now() - 2 * LEAD, LEAD, OVERLAP)
    rings.retire(files, first, now(), 3)
    assert first not in {key.kid for key in rings.read(files).keys}
    assert not files.pem(first).exists()
    (kept,) = files.private.iterdir()
    serialization.load_pem_private_key(kept.read_bytes(), None)
