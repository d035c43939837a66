"""How the commands speak: command line, errors, progress."""
