"""An MCP server with good and bad tools, over stdio or, given a port, streamable HTTP."""

from __future__ import annotations

import base64
import os
import sys
import time

import anyio
from mcp.server.mcpserver import Image, MCPServer

server = MCPServer("odd jobs")
kept: list[str] = []


@server.tool()
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool()
def keep(word: str) -> str:
    """Keep a word, and tell all that were kept."""
    kept.append(word)
    return " ".join(kept)


@server.tool()
def fail(why: str) -> str:
    """Fail."""
    raise ValueError(why)


@server.tool()
async def hang() -> str:
    """Never answer."""
    await anyio.sleep(3600)
    return "late"


@server.tool()
def freeze() -> str:
    """Answer nobody any more."""
    time.sleep(3600)
    return "late"


@server.tool()
def die() -> str:
    """Kill the server."""
    os.kill(os.getpid(), 9)
    return "dead"


@server.tool()
def pid() -> str:
    """The server's process."""
    return str(os.getpid())


@server.tool()
def environment() -> str:
    """Names of the variables that the server sees."""
    return " ".join(sorted(os.environ))


@server.tool()
def picture() -> list[str | Image]:
    """A word and a picture."""
    return ["look:", Image(data=base64.b64decode("R0lGODlhAQABAAAAACw="), format="gif")]


@server.tool()
def flood() -> str:
    """A million characters."""
    return "x" * 10**6


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
