"""What goes wrong on the other side of a bridge."""


class BridgeError(Exception):
    """A rollout that cannot go on, in one line. Not a RequestError: it is recorded on its rollout and costs no other."""
