"""Settings: what is understood, and that everything else stops the start."""

from dataclasses import fields
from pathlib import Path

import pytest

from api.settings import BadSettings, Settings, load

BOUNDS = {
    "amqp_port": (1, 65535),
    "api_port": (1, 65535),
    "auth_port": (1, 65535),
    "worker_port": (1, 65535),
    "backlog": (1, 250),  # the default of `largest_backlog`
    "largest_backlog": (50, 10_000),  # from the default of `backlog`
    "retention": (1, 3650),
}


def test_the_environment_goes_over_the_file_and_the_command_line_over_both(tmp_path: Path) -> None:
    file = tmp_path / "restante.toml"
    file.write_text("retention = 7\nbacklog = 10\napi_port = 1000\n")
    environment = {"RESTANTE_CONFIG": str(file), "RESTANTE_BACKLOG": "20", "RESTANTE_API_PORT": "2000"}
    settings = load(environment, {"api_port": 3000})
    assert (settings.retention, settings.backlog, settings.api_port) == (7, 20, 3000)


def test_nothing_set_gives_the_defaults() -> None:
    assert load({"PATH": "/bin"}) == Settings()


def test_no_whole_number_is_without_bounds() -> None:
    numbers = [setting.name for setting in fields(Settings) if isinstance(setting.default, int)]
    assert set(BOUNDS) <= set(numbers)
    for name in numbers:
        for bad in (0, 10**12):
            with pytest.raises(BadSettings, match=f"'{name}' is .* from .* to .*, not {bad}"):
                load({}, {name: bad})


@pytest.mark.parametrize("name", BOUNDS)
def test_a_whole_number_has_bounds_of_its_own(name: str) -> None:
    lowest, highest = BOUNDS[name]
    for good in (lowest, highest):
        assert getattr(load({f"RESTANTE_{name.upper()}": str(good)}), name) == good
        assert getattr(load({}, {name: good}), name) == good
    for bad in (lowest - 1, highest + 1, "", "1.5", "many", True, 1.0):
        with pytest.raises(BadSettings, match=name):
            load({}, {name: bad})


def test_the_default_backlog_is_no_higher_than_the_highest() -> None:
    both = {"RESTANTE_BACKLOG": "10000", "RESTANTE_LARGEST_BACKLOG": "10000"}
    assert load(both).backlog == 10_000
    with pytest.raises(BadSettings, match=r"'backlog' \(10000\) is above 'largest_backlog' \(250\)"):
        load({"RESTANTE_BACKLOG": "10000"})


@pytest.mark.parametrize(("name", "good"), [("log_level", "debug"), ("log_format", "json")])
def test_what_has_choices_is_one_of_them(name: str, good: str) -> None:
    assert getattr(load({f"RESTANTE_{name.upper()}": good}), name) == good
    with pytest.raises(BadSettings, match=f"'{name}' is one of .*{good}"):
        load({}, {name: good.upper()})


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(BadSettings, match=r"no setting 'retentoin'.*retention"):
        load({"RESTANTE_RETENTOIN": "30"})
