"""Programs of their own, and environments that only an interpreter with verifiers can import."""

collect_ignore_glob = ["public/*", "modules/*", "servers/*", "standin/*"]
