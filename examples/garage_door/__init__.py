"""The device of the demo: handlers in Python and as executables."""
