"""Environments of other libraries, played as they are: ``verifiers`` in a process of its own, OpenEnv servers over WebSocket."""
