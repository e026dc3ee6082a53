"""Tools that a model calls, and the episodes in which it does."""

from veneer.envs.tools.episode import Task, ToolEnv
from veneer.envs.tools.tool import Tool, ToolError

__all__ = ["Task", "Tool", "ToolEnv", "ToolError"]
