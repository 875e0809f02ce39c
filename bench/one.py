"""One measure, in a process of its own: nothing of the one before it is left, and it can be ended when it is overdue.

`python -m bench.one NAME FILE …`: what it found goes to FILE.
"""

import argparse
import json
import os
from pathlib import Path

from bench import documents
from bench.measures import MEASURES
from bench.run import Options

DATABASE = "RESTANTE_BENCH_DATABASE"  # in the environment, where nobody else reads the password in it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("file", type=Path)
    parser.add_argument("--budget", type=float, required=True, help="seconds")
    given = parser.parse_args()
    result = MEASURES[given.measure].run(Options(False, given.budget, os.environ.get(DATABASE, "")))
    given.file.write_text(json.dumps(documents.to_document(result)))


if __name__ == "__main__":
    main()
