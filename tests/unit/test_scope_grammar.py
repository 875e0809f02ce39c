"""The grammar of scopes against a naive reading of it, and what rights they add up to."""

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.identity import scopes
from fabric.identity.scopes import MAX_SCOPES, NARROWED, NOTHING, Narrowing, Rights, Target, parse, read
from topology import names

DEVICES = ("door", "door-1", "pump")
GROUPS = ("door", "garage", "garage.left")
NAMES = ("door", "door.open", "door.open.wide", "doors.open", "door.*", "doors.*", "door.open.*")


# ---- A naive reference: character by character, no regular expression, no sharing --------------------


def is_word(text: str) -> bool:
    first, rest = string.ascii_lowercase + string.digits, string.ascii_lowercase + string.digits + "_-"
    return text != "" and text[0] in first and all(character in rest for character in text)


def is_dotted(text: str) -> bool:
    return len(text) <= 128 and all(is_word(word) for word in text.split("."))


def reference(text: str) -> tuple[str, str | None, str | None, str | None] | None:
    """(action, device, group, name), or None."""
    action, at, where = text.partition("@")
    if action not in NARROWED:
        return None
    most = NARROWED[action]
    if not at:
        return action, None, None, None
    owner, slash, name = where.partition("/")
    kind, _, id = owner.partition(":")
    if most is Narrowing.NOT or (most is Narrowing.GROUP and kind != "group"):
        return None
    if slash and (most is not Narrowing.NAME or not is_dotted(name.removesuffix(".*"))):
        return None
    if kind == "device" and len(id) <= 63 and is_word(id):
        return action, id, None, name if slash else None
    if kind == "group" and is_dotted(id):
        return action, None, id, name if slash else None
    return None


def reference_may(claim: list[str], action: str, device: str, groups: tuple[str, ...], name: str | None) -> bool:
    for text in claim:
        found = reference(text)
        if found is None or found[0] != action:
            continue
        _, only, group, pattern = found
        if only is not None and only != device:
            continue
        if group is not None and group not in groups:
            continue
        if pattern is None:
            return True
        if name is None:
            continue
        words, asked = pattern.split("."), name.split(".")
        if words[-1] == "*" and len(asked) >= len(words) and asked[: len(words) - 1] == words[:-1]:
            return True
        if words == asked:
            return True
    return False


# ---- Texts near the grammar --------------------------------------------------------------------------

pieces = st.sampled_from(
    [
        *NARROWED, "@", "device:", "group:", "/", ".", ".*", "*", "door", "garage", "x", "-", "_", "A", "é", "\n", "\t",
        "\x00", "\u0085", "\u00a0", "@device:", "@group:", ":", "a" * 63, "a" * 64, "a" * 128, "a" * 129,
    ]
)  # fmt: skip
near = st.lists(pieces, max_size=9).map("".join)
valid = st.builds(
    lambda action, where, name: action + where + (name if where else ""),
    st.sampled_from(sorted(NARROWED)),
    st.sampled_from(["", *(f"@device:{id}" for id in DEVICES), *(f"@group:{group}" for group in GROUPS)]),
    st.sampled_from(["", *(f"/{name}" for name in NAMES)]),
)
texts = st.one_of(valid, near, st.text(max_size=40))


@settings(max_examples=600)
@given(texts)
def test_one_scope_is_what_the_grammar_says(text: str) -> None:
    found = read(text)
    assert (
        None if found is None else (found.action, found.device, next(iter(found.groups), None), found.name)
    ) == reference(text)
    if found is not None:
        assert len(text) <= scopes.LONGEST_SCOPE
        assert re.fullmatch(scopes.GRAMMAR, text)


@settings(max_examples=500)
@given(
    st.lists(st.one_of(valid, near), max_size=6),
    st.sampled_from(sorted(NARROWED)),
    st.sampled_from(DEVICES),
    st.sets(st.sampled_from(GROUPS)).map(tuple),
    st.sampled_from([None, "door", "door.open", "door.open.wide", "doors.open", "doors"]),
)
def test_rights_are_the_union(
    claim: list[str], action: str, device: str, groups: tuple[str, ...], name: str | None
) -> None:
    rights = parse(" ".join(claim))
    entries = [] if not " ".join(claim).isascii() else [part for each in claim for part in each.split(" ")]
    expected = reference_may(entries, action, device, groups, name)
    assert rights.may(action, Target(device, groups), name) == expected
    if expected:
        assert rights.may_some(action)
    if expected != rights.may(action, Target(device), name):
        assert rights.by_group(action), "its groups made the difference"
    if rights.may(action):
        assert expected, "what may be done to all may be done to each"


@settings(max_examples=500)
@given(
    st.lists(valid, max_size=4),
    valid,
    st.sampled_from(DEVICES),
    st.sets(st.sampled_from(GROUPS)).map(tuple),
    st.sampled_from([None, "door", "door.open", "door.open.wide", "doors.open", "doors"]),
)
def test_what_is_covered_grants_nothing_more(
    held: list[str], asked: str, device: str, groups: tuple[str, ...], name: str | None
) -> None:
    mine, made = parse(" ".join(held)), parse(asked)
    if mine.covers(asked):
        for action in NARROWED:
            if made.may(action, Target(device, groups), name):
                assert mine.may(action, Target(device, groups), name)
            assert made.may(action) <= mine.may(action)
    assert parse(asked).covers(asked) == (read(asked) is not None)


@settings(max_examples=300)
@given(st.text(max_size=400))
def test_the_parser_takes_any_text(claim: str) -> None:
    rights = parse(claim)
    assert rights.whole <= scopes.ACTIONS
    assert set(rights.narrow) <= scopes.ACTIONS
    if not claim.isascii():
        assert rights == NOTHING


@pytest.mark.parametrize(
    "scope",
    [
        "commands:send@group:garage/door.*x", "commands:send@group:garage/*", "commands:send@group:garage/door.*.x",
        "commands:send@group:garage/door*", "commands:send@group:garage/.*", "commands:send@group:garage/",
        "commands:send@group:garage/door..x", "commands:send@group:garage.*", "commands:send@group:*",
        "commands:send@device:*", "commands:send@device:door.x", "commands:send@device:", "commands:send@",
        "commands:send/door", "commands:send@door", "commands:send@group:a@device:b", "commands:send@device:b/a/c",
        "commands:send@Device:b", "Commands:send", "commands:*", "*", "commands:send@device:door\n",
        "commands:read@group:garage/door.*", "devices:write@device:door/x", "groups:write@device:door",
        "groups:write@group:g/x", "tokens:write@group:garage", "tokens:write@device:door", "audit:read@device:door/x",
        f"commands:send@device:{'a' * 64}", f"commands:send@group:{'a' * 129}", f"commands:send@group:a/{'b' * 129}",
    ],
)  # fmt: skip
def test_what_is_malformed_grants_nothing(scope: str) -> None:
    assert read(scope) is None
    rights = parse(scope)
    assert rights == NOTHING
    action = scope.partition("@")[0]
    assert not rights.may_some(action)
    assert not rights.may(action, Target("door", ("garage",)), "door.x")
    assert not Rights(whole=scopes.ACTIONS).covers(scope), "nor can it be minted"


def test_it_does_not_take_its_neighbours_with_it() -> None:
    rights = parse("commands:send@group:garage/door.*x devices:read@device:pump  commands:read")
    assert rights.whole == {"commands:read"}
    assert set(rights.narrow) == {"devices:read"}


@pytest.mark.parametrize(
    ("name", "may"),
    [("door.open", True), ("door.open.wide", True), ("door", False), ("doors.x", False), ("door-x.y", False)],
)
def test_the_final_star_is_one_or_more_words(name: str, may: bool) -> None:
    rights = parse("commands:send@group:garage/door.*")
    assert rights.may("commands:send", Target("a", ("garage",)), name) is may
    assert not rights.may("commands:send", Target("a", ("garage.left",)), name), "groups are exact"
    assert not rights.may("commands:send", Target("garage"), name), "a device is no group"


def test_a_question_that_leaves_something_out_is_about_all_of_it() -> None:
    rights = parse("commands:send@device:door/open")
    assert rights.may("commands:send", Target("door"), "open")
    assert not rights.may("commands:send", Target("door"))
    assert not rights.may("commands:send")
    assert rights.may_some("commands:send")


def test_a_group_is_told_by_whoever_may_tell_it_and_all_by_whoever_is_not_narrowed() -> None:
    rights = parse("notifications:send@group:garage notifications:send@device:door")
    assert rights.may("notifications:send", Target(groups=("garage",)), "news")
    assert not rights.may("notifications:send", Target(groups=("door",)), "news")
    assert rights.may("notifications:send", Target("door"), "news")
    assert not rights.may("notifications:send", None, "news")
    assert parse("notifications:send").may("notifications:send", None, "news")


@pytest.mark.parametrize("separator", ["\u0085", "\u00a0", "\u2028", "\t", "\n", "\x1c", ",", "+"])
def test_only_a_space_separates(separator: str) -> None:
    assert parse(f"devices:read{separator}commands:send") == NOTHING
    assert parse("devices:read commands:send").whole == {"devices:read", "commands:send"}


def test_a_hundred_at_most() -> None:
    assert parse(" ".join(["devices:read"] * MAX_SCOPES)).may("devices:read")
    assert parse(" ".join(["devices:read"] * (MAX_SCOPES + 1))) == NOTHING


@pytest.mark.parametrize(
    ("held", "asked", "covered"),
    [
        ("commands:send", "commands:send@group:a/x.*", True),
        ("commands:send@group:a", "commands:send@group:a/x", True),
        ("commands:send@group:a", "commands:send@device:d", False),  # whoever is in the group today may leave it
        ("commands:send@device:d", "commands:send@group:a", False),
        ("commands:send@group:a/x.*", "commands:send@group:a/x.y.*", True),
        ("commands:send@group:a/x.*", "commands:send@group:a/x.*", True),
        ("commands:send@group:a/x.*", "commands:send@group:a/x", False),
        ("commands:send@group:a/x.y", "commands:send@group:a/x.*", False),
        ("commands:send@group:a/x.*", "commands:send@group:a", False),
        ("commands:send@group:a/x.*", "commands:send@group:b/x.y", False),
        ("commands:send@device:d/x.*", "commands:send", False),
        ("commands:send@device:d", "commands:read@device:d", False),
        ("groups:write@group:a", "groups:write@group:a", True),
        ("groups:write@group:a", "groups:write", False),
        ("tokens:write", "tokens:write", True),
        ("devices:read", "nonsense", False),
    ],
)
def test_covering(held: str, asked: str, covered: bool) -> None:
    assert parse(held).covers(asked) is covered


def test_the_alphabet_is_that_of_names() -> None:
    """The reference above has its own; they are the same."""
    for text in ("a", "a-b", "_a", "-a", "a.b", "a..b", "", "A", "é", "a\n"):
        assert names.is_dotted(text) == (is_dotted(text) and text != "")


# ---- What two have in common -------------------------------------------------------------------------


@settings(max_examples=600)
@given(
    st.lists(valid, max_size=5),
    st.lists(valid, max_size=5),
    st.sampled_from(sorted(NARROWED)),
    st.sampled_from([None, *(Target(device) for device in DEVICES), *(Target(groups=(group,)) for group in GROUPS)]),
    st.sets(st.sampled_from(GROUPS)).map(tuple),
    st.sampled_from([None, *NAMES]),
)
def test_an_intersection_grants_what_both_grant(
    one: list[str], other: list[str], action: str, target: Target | None, groups: tuple[str, ...], name: str | None
) -> None:
    mine, ceiling = parse(" ".join(one)), parse(" ".join(other))
    common = mine.within(ceiling)
    if target is not None and target.device is not None:
        target = Target(target.device, groups)
    assert common.may(action, target, name) == (mine.may(action, target, name) and ceiling.may(action, target, name))
    for scope in (*one, *other):
        assert common.covers(scope) == (mine.covers(scope) and ceiling.covers(scope))
    assert not common.may_some(action) or (mine.may_some(action) and ceiling.may_some(action))


@pytest.mark.parametrize(
    ("granted", "ceiling", "left"),
    [
        ("commands:send", "commands:send@group:garage/door.*", "commands:send@group:garage/door.*"),
        ("commands:send@device:a/door.open", "commands:send@device:a/door.*", "commands:send@device:a/door.open"),
        ("commands:send@device:a", "commands:send@device:b", ""),
        ("commands:send@device:a/door", "commands:send@device:a/door.*", ""),
        ("commands:send tokens:write", "devices:read", ""),
        ("devices:read commands:read", "commands:read commands:send", "commands:read"),
        ("", "devices:read", ""),
        ("devices:read", "", ""),
    ],
)
def test_an_intersection_is_as_narrow_as_the_narrower(granted: str, ceiling: str, left: str) -> None:
    assert parse(granted).within(parse(ceiling)) == parse(left)
    assert parse(ceiling).within(parse(granted)) == parse(left)


def test_of_two_groups_a_device_in_both_is_left() -> None:
    common = parse("commands:send@group:garage").within(parse("commands:send@group:door"))
    assert common.may("commands:send", Target("a", ("door", "garage", "x")))
    assert not common.may("commands:send", Target("a", ("garage",)))
    assert common.by_group("commands:send")
