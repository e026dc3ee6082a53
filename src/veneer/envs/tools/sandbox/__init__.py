"""Python programs that nobody has to trust."""

from veneer.envs.tools.sandbox.confine import Outcome, Sandbox, SandboxError
from veneer.envs.tools.sandbox.process import Limits

__all__ = ["Limits", "Outcome", "Sandbox", "SandboxError"]
