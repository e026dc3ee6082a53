"""What a client must not notice: a server that is killed, neighbours that misbehave, and more of a full disk than the save that fails."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from client import CLIENTS, Stage, last_line, read_lines

from server import Server

STEPS = 20
DISK, LEFT = "48m", 2**18
"""Of the full disk: its size, and the bytes left on it, which hold a request and no checkpoint."""
KILLED_BEHIND = (3, 10, 11)
"""The server is killed right after the client has written these steps: the client is then inside the next one."""


def restart(stage: Stage) -> dict[str, Any]:
    """kill -9 in the middle of a running loop, and the same port and home again: the client goes on, to the same numbers."""
    server = Server(stage.logs.parent / "home-restart", stage.logs / "server-restart.log")
    clients: list[subprocess.Popen[bytes]] = []
    down: list[float] = []
    try:
        server.start()
        clients.append(start_loop(stage, "restart_alone", server.url))
        wanted = finish(stage, clients[0], "restart_alone")
        clients.append(start_loop(stage, "restart_killed", server.url))
        for step in KILLED_BEHIND:
            wait_for_lines(stage, clients[1], "restart_killed", step + 1)
            server.kill()
            clock = time.monotonic()
            time.sleep(1.0)
            server.start()
            down.append(time.monotonic() - clock)
        found = finish(stage, clients[1], "restart_killed")
    finally:
        end(clients)
        server.stop()
    compare(found, wanted, "the interrupted run")
    return {"kills": len(down), "steps": len(found), "longest_seconds_down": max(down)}


def tenants(stage: Stage) -> dict[str, Any]:
    """A tenant beside two vandals, one of which is killed with work in flight: bit for bit its run alone."""
    stop = stage.logs / "tenants.stop"
    url = stage.server.url
    wanted = finish(stage, start_loop(stage, "tenants_alone", url), "tenants_alone")
    vandals = {name: start_vandal(stage, name, stop, *more) for name, more in {"vandal": (), "vandal_killed": ("--flood",)}.items()}
    clients = list(vandals.values())
    try:
        for name, vandal in vandals.items():
            wait_for_lines(stage, vandal, name, 1)
        process = start_loop(stage, "tenants_beside", url)
        clients.append(process)
        wait_for_lines(stage, process, "tenants_beside", STEPS // 2)
        vandals["vandal_killed"].send_signal(signal.SIGKILL)
        found = finish(stage, process, "tenants_beside")
        stop.touch()
        code = vandals["vandal"].wait(120)
        said = read_lines(lines_of(stage, "vandal"))
        assert code == 0, said[-1].get("error") if said else last_line(stage.logs / "vandal.log")
    finally:
        end(clients)
    compare(found, wanted, "the run beside vandals")
    return {"steps": len(found), "refused": said[-1]["refused"], "rounds_of_garbage": said[-1]["rounds"]}


def full_disk(stage: Stage) -> dict[str, Any]:
    """A save that does not fit fails in words and the run goes on; with room again the next save works, and every loss is that of a run
    that never met a full disk."""
    disk, go, room = stage.logs.parent / "disk", stage.logs / "full_disk.go", stage.logs / "full_disk.room"
    for file in (go, room):
        file.unlink(missing_ok=True)
    disk.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        return {"skipped": f"mount is not permitted here ({mounted.stderr.strip()})"}
    server, filling = Server(disk / "home", stage.logs / "server-full-disk.log"), disk / "filling"
    clients: list[subprocess.Popen[bytes]] = []
    try:
        server.start()
        for name, more in (("full_disk_calm", ()), ("full_disk", ("--go", go, "--room", room))):
            lines_of(stage, name).unlink(missing_ok=True)
            clients.append(stage.start(name, CLIENTS / "full_disk.py", "--lines", lines_of(stage, name), *more, url=server.url))
            if more:
                wait_for_lines(stage, clients[-1], name, 4)
                filling.write_bytes(b"x" * (shutil.disk_usage(disk).free - LEFT))
                go.touch()
                wait_for_lines(stage, clients[-1], name, 9)  # the refusal, and all the steps behind it
                filling.unlink()
                room.touch()
            code = clients[-1].wait(120)
            assert code == 0, f"{name}: exit code {code}: {last_line(stage.logs / f'{name}.log')}"
    finally:
        end(clients)
        server.stop()
        subprocess.run(["umount", "-l", disk], check=False)
    calm, found = (read_lines(lines_of(stage, name)) for name in ("full_disk_calm", "full_disk"))
    (refused,) = (line["refused"] for line in found if "refused" in line)
    assert refused is not None, "a checkpoint was saved on a full disk"
    assert "space" in refused, refused
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (calm, found)]
    assert losses[0] == losses[1], f"{losses[1]} and not {losses[0]}"
    return {"steps": len(losses[0]), "refused": 1}


# ---------------------------------------------------------------- the loop


def lines_of(stage: Stage, name: str) -> Path:
    return stage.logs / f"{name}.jsonl"


def start_loop(stage: Stage, name: str, url: str) -> subprocess.Popen[bytes]:
    lines_of(stage, name).unlink(missing_ok=True)
    return stage.start(name, CLIENTS / "loop.py", "--lines", lines_of(stage, name), "--steps", STEPS, "--seed", 7, url=url)


def start_vandal(stage: Stage, name: str, stop: Path, *more: str) -> subprocess.Popen[bytes]:
    stop.unlink(missing_ok=True)
    lines_of(stage, name).unlink(missing_ok=True)
    return stage.start(name, CLIENTS / "vandal.py", "--stop", stop, "--lines", lines_of(stage, name), *more)


def end(clients: list[subprocess.Popen[bytes]]) -> None:
    """Whoever still runs, because something failed before it was done."""
    for client in clients:
        if client.poll() is None:
            client.kill()
            client.wait()


def wait_for_lines(stage: Stage, process: subprocess.Popen[bytes], name: str, count: int, patience: float = 300.0) -> None:
    clock = time.monotonic()
    while len(read_lines(lines_of(stage, name))) < count:
        if process.poll() is not None:
            raise AssertionError(f"{name} ended early with code {process.returncode}: {last_line(stage.logs / f'{name}.log')}")
        if time.monotonic() - clock > patience:
            process.kill()
            raise AssertionError(f"{name} wrote {len(read_lines(lines_of(stage, name)))} lines in {patience:.0f} s, not {count}")
        time.sleep(0.02)


def finish(stage: Stage, process: subprocess.Popen[bytes], name: str) -> list[dict[str, Any]]:
    wait_for_lines(stage, process, name, STEPS)
    code = process.wait(60)
    assert code == 0, f"{name}: exit code {code}: {last_line(stage.logs / f'{name}.log')}"
    return read_lines(lines_of(stage, name))


def compare(found: list[dict[str, Any]], wanted: list[dict[str, Any]], what: str) -> None:
    """Bit for bit: JSON writes a float so that it is read back exactly."""
    assert len(found) == len(wanted) == STEPS, f"{what} has {len(found)} lines, the run alone {len(wanted)}"
    for line, expected in zip(found, wanted, strict=True):
        for key, value in expected.items():
            assert line[key] == value, f"{what} differs from the run alone at step {expected['step']}: {key}"
