"""Measures: pure functions over rewards, run records and adapters."""
