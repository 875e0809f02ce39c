"""The real programs that tests run against, started and ended by the tests."""
