"""Two environments of OpenEnv, each on a server of openenv itself: ``counting.py PORT KIND SESSIONS``.

``say``: the reward of a turn is the share of digits in it; the second turn is the last. Messages that begin with "!" go wrong.
``pick``: the action is a whole number. ``tools``: the tools of an MCP server, without an end.
"""

import os
import sys
import time

import uvicorn
from openenv.core.env_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State

port, kind, sessions = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])


class Said(Action):
    message: str


class Picked(Action):
    number: int


class Seen(Observation):
    text: str = ""


class Counting(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self._state = State()

    def reset(self, seed=None, episode_id=None, start="count", **kwargs):
        self._state = State(step_count=0)
        return Seen(text=f"{start} from {seed}")

    def step(self, action, timeout_s=None, **kwargs):
        self._state.step_count += 1
        text = action.message if kind == "say" else str(action.number)
        if text == "!die":
            os._exit(1)
        if text == "!slow":
            time.sleep(5)
        if text == "!raise":
            raise ValueError("that is\nnot allowed")
        reward = float("nan") if text == "!nan" else sum(c.isdigit() for c in text) / max(len(text), 1)
        return Seen(text=f"{len(text)} letters", reward=reward, done=self._state.step_count == 2)

    @property
    def state(self):
        return self._state


class Tools(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        from fastmcp import FastMCP

        server = FastMCP("tools")

        @server.tool
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            return a + b

        super().__init__(server)
        self._state = State()

    def reset(self, seed=None, episode_id=None, **kwargs):
        return Observation(done=False)

    def _step_impl(self, action, timeout_s=None, **kwargs):
        return Observation(done=False)

    @property
    def state(self):
        return self._state


if kind == "tools":
    app = create_fastapi_app(Tools, CallToolAction, CallToolObservation, max_concurrent_envs=sessions)
else:
    app = create_fastapi_app(Counting, Said if kind == "say" else Picked, Seen, max_concurrent_envs=sessions)
uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
