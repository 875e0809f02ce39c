"""docs/security.md: each attack has a test, and the tests and files that it names exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
TESTS = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))
FILES = sorted(set(re.findall(r"`((?:api|fabric|topology|device_agent|deploy|requirements)/[\w./-]*)`", PAGE)))


def test_each_attack_has_a_test() -> None:
    table = PAGE.partition("## Attacks")[2].partition("## Reporting")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 50
    assert [row for row in rows if "::test_" not in row] == []


@pytest.mark.parametrize("file", sorted({file for file, _ in TESTS}))
def test_each_test_is_there(file: str) -> None:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    known = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert {name for its, name in TESTS if its == file} <= known


def test_each_file_is_there() -> None:
    assert [file for file in FILES if not (ROOT / file).exists()] == []
