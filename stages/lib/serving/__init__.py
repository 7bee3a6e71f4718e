"""`make serve`: models behind OpenAI's routes, on this machine."""
