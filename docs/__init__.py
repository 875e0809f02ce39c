"""The documentation; `docs.diagrams` makes the part of it that is generated."""
