"""How the built-in model is made: `python -m server.embedded.training`."""
