"""Coverage-guided fuzzing of what decodes bytes from outside: `make fuzz`. No part of `make test`."""
