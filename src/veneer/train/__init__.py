"""Rollouts, advantages, datums and the loops. An ``Engine`` is handed in; nothing here imports one."""
