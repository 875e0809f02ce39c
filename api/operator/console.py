"""What the commands of `restante` print, and how they end."""

import json
import sys

EXIT_FAILED = 1
EXIT_USAGE = 2


def show(value: object) -> int:
    """A document, on standard output."""
    print(json.dumps(value, indent=2))
    return 0


def say(text: str) -> None:
    """What happens meanwhile, for a person, on standard error."""
    print(f"restante: {text}", file=sys.stderr, flush=True)
