"""A stand-in for counting.py where openenv is not installed: the same environments behind the same wire, written from its source
(openenv 0.10, core/env_server/http_server.py and types.py). It proves nothing about openenv; the tests run against that too
(``make bridges``)."""

import asyncio
import json
import os
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

port, kind, sessions = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
TEXT, NUMBER = {"title": "Message", "type": "string"}, {"title": "Number", "type": "integer"}
FIELDS = {
    "say": {"message": TEXT},
    "pick": {"number": NUMBER},
    "tools": {"type": {"const": "call_tool", "type": "string"}, "tool_name": TEXT, "arguments": {"type": "object"}},
}
ADD = {
    "name": "add",
    "description": "Add two numbers.",
    "inputSchema": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]},
}
running = 0


def observation(seen, reward=None, done=False):
    return {"type": "observation", "data": {"observation": {"metadata": {}, **seen}, "reward": reward, "done": done}}


def error(code, message, **more):
    return {"type": "error", "data": {"message": message, "code": code, **more}}


async def step(action, turn):
    if kind == "tools":
        if action["tool_name"] != "add":
            problem = {"error_type": "tool_not_found", "message": f"Unknown tool: '{action['tool_name']}'"}
            return observation({"tool_name": action["tool_name"], "result": None, "error": problem})
        total = sum(action["arguments"].values())
        blocks = {"content": [{"type": "text", "text": str(total)}], "is_error": False, "data": total}
        return observation({"tool_name": "add", "result": blocks, "error": None})
    if set(action) - {"message", "number"}:
        wrong = next(iter(set(action) - {"message", "number"}))
        return error("VALIDATION_ERROR", "Invalid message", errors=[{"loc": [wrong], "msg": "Extra inputs are not permitted"}])
    text = str(action.get("message", action.get("number")))
    if text == "!die":
        os._exit(1)
    if text == "!slow":
        await asyncio.sleep(5)
    if text == "!raise":
        return error("EXECUTION_ERROR", "that is\nnot allowed")
    reward = None if text == "!nan" else sum(c.isdigit() for c in text) / max(len(text), 1)
    return observation({"text": f"{len(text)} letters"}, reward, done=turn == 2)


async def session(socket: WebSocket) -> None:
    global running
    await socket.accept()
    if running >= sessions:
        await socket.send_json(error("CAPACITY_REACHED", "Server at capacity", active_sessions=running, max_sessions=sessions))
        await socket.close()
        return
    running, turn = running + 1, 0
    try:
        while (message := json.loads(await socket.receive_text()))["type"] != "close":
            if message["type"] == "reset":
                turn = 0
                first = f"{message['data'].get('start', 'count')} from {message['data']['seed']}"
                await socket.send_json(observation({} if kind == "tools" else {"text": first}))
            elif message["type"] == "mcp":
                assert message["data"]["method"] == "tools/list"
                await socket.send_json({"type": "mcp", "data": {"jsonrpc": "2.0", "id": message["data"]["id"], "result": {"tools": [ADD]}}})
            else:
                turn += 1
                await socket.send_text(json.dumps(await step(message["data"], turn)))
    except WebSocketDisconnect:
        pass  # an episode ends so
    finally:
        running -= 1


async def schema(_request):
    return JSONResponse({"action": {"properties": {**FIELDS[kind], "metadata": {"type": "object"}}}, "observation": {}, "state": {}})


app = Starlette(routes=[Route("/schema", schema), WebSocketRoute("/ws", session)])
uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
