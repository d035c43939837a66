"""What every command has: its parser, progress, Ctrl-C and the set-up of JAX."""
