"""The commands a person runs, one file each."""
