"""What `pip install restante` brings: everything that the programs read at run time."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = {
    "api/operator/rabbitmq/rabbitmq.conf",
    "api/operator/rabbitmq/advanced.config",
    "api/operator/rabbitmq/enabled_plugins",
    "device_agent/systemd/restante-agent.service",
    "fabric/sql/migrations/env.py",
    "fabric/sql/migrations/versions/0001_first_schema.py",
}


def test_the_wheel_has_all_files_and_all_programs(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        points = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
        metadata = next(archive.read(name).decode() for name in names if name.endswith("METADATA"))
    assert names >= NEEDED
    assert not [name for name in names if name.startswith(("tests/", "examples/"))]
    assert "restante = api.operator.cli:main" in points
    assert "restante-agent = device_agent.cli:main" in points
    assert "restante-bench = bench.cli:main" in points
    base = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert {line.split()[1].split(">")[0].split("[")[0].lower() for line in base} == {"pika", "pyjwt"}
