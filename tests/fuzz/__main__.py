"""`python -m tests.fuzz SECONDS [TARGET…]`: each target for so long, in a process of its own."""

import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

LONGEST = 4096  # bytes of an input
FOUND = Path(".fuzz")  # where inputs are kept that broke something

with atheris.instrument_imports(
    include=["topology", "fabric", "device_agent", "api", "pamqp", "pika", "jwt"], enable_loader_override=False
):
    from tests.fuzz import targets


def main(seconds: str, *names: str) -> int:
    """The exit status: how many targets broke."""
    broken = 0
    for target in targets.TARGETS:
        if names and target.__name__ not in names:
            continue
        print(f"== {target.__name__}: {(target.__doc__ or '').strip()}", flush=True)
        FOUND.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as corpus:
            for number, (name, seed) in enumerate(targets.seeds()):
                if name == target.__name__:
                    (Path(corpus) / str(number)).write_bytes(seed)
            options = [
                f"-max_total_time={seconds}",
                f"-max_len={LONGEST}",
                f"-artifact_prefix={FOUND}/{target.__name__}-",
                "-verbosity=0",
            ]
            done = subprocess.run(
                [sys.executable, "-m", "tests.fuzz", "--one", target.__name__, *options, corpus], check=False
            )
        broken += done.returncode != 0
    return broken


def one(name: str, *options: str) -> None:
    """Fuzz in this very process; it does not come back."""
    atheris.Setup([sys.argv[0], *options], next(each for each in targets.TARGETS if each.__name__ == name))
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        one(*sys.argv[2:])
    sys.exit(main(*sys.argv[1:]))
