"""Runs, checkpoints and adapters on disk. Everything is written aside and renamed; nothing is ever unpickled."""
