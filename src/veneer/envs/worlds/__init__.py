"""Three small worlds to act in: a website to read, a plan to carry out, a shop to run."""

from veneer.envs.worlds.browse import browse
from veneer.envs.worlds.shop import shop
from veneer.envs.worlds.workflow import workflow

__all__ = ["browse", "shop", "workflow"]
