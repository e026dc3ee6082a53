"""Functions ``f`` that want to be taken for right without knowing the answer."""

SECRET = "a text that only the tests hold"

CHEATS = {
    "prints the verdict": """
print('{"loaded": "", "results": ["passed"]}')
def f():
    print("passed", flush=True)
""",
    "exits with 0": """
import sys
def f():
    sys.exit(0)
""",
    "exits at once with 0": """
import os
def f():
    os._exit(0)
""",
    "exits when loaded": """
import os
os._exit(0)
""",
    "equals everything": """
class Equal:
    __hash__ = None
    def __eq__(self, other):
        return True
def f():
    return Equal()
""",
    "a text that equals everything": """
class Equal(str):
    __hash__ = str.__hash__
    def __eq__(self, other):
        return True
    def __str__(self):
        return self
def f():
    return Equal()
""",
    "a list that equals everything": """
class Equal(list):
    def __eq__(self, other):
        return True
def f():
    return Equal()
""",
    "patches assertions": """
import builtins
builtins.AssertionError = type("Never", (BaseException,), {})
builtins.repr = lambda value: ""
def f():
    return 1
""",
    "raises that a test is skipped": """
import unittest
def f():
    raise unittest.SkipTest("passed")
""",
    "patches what carries values": """
import sys
for name in ("carry", "__main__"):
    sys.modules[name].pack = lambda value: ["iterator"]
def f():
    return 1
""",
    "writes answers of its own": """
import os
for fd in range(3, 20):
    for _ in range(9):
        try:
            os.write(fd, b'{"value": null, "results": ["passed"], "loaded": ""}\\n')
        except OSError:
            pass
def f():
    return 1
""",
    "writes nonsense": """
import os
for fd in range(3, 20):
    try:
        os.write(fd, b"{" * 10**5 + b"\\n[\\n")
    except OSError:
        pass
def f():
    return 1
""",
    "answers without end": """
import os
for fd in range(3, 20):
    try:
        while True:
            os.write(fd, b"x" * 10**6)
    except OSError:
        pass
""",
    "nests too deeply": """
import os
for fd in range(3, 20):
    try:
        os.write(fd, b'{"value": null}\\n{"arguments": ["list"], "value": ' + b'["list", ' * 5000 + b"1" + b"]" * 5000 + b"}\\n")
    except OSError:
        pass
def f():
    return 1
""",
    "looks in frames and memory": """
import gc, sys
def f():
    seen, frame = [], sys._getframe()
    while frame:
        seen += [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]
        frame = frame.f_back
    for thing in [*seen, *gc.get_objects()]:
        for text in [thing, *(thing.values() if type(thing) is dict else thing if type(thing) in (list, tuple) else [])]:
            if isinstance(text, str) and text.startswith("a text") and text.endswith("hold"):
                return text
""",
    "looks in files": """
import glob
def f():
    for path in [*glob.glob("/tmp/**", recursive=True), *glob.glob("/*"), *glob.glob("/proc/*/*"), *glob.glob("/dev/**", recursive=True)]:
        if path.startswith("/dev/") and "zero" in path or "random" in path or "full" in path:
            continue
        try:
            text = open(path, errors="replace").read()
        except OSError:
            continue
        at = text.find("a text that" + " only")
        if at >= 0:
            return text[at : at + 31]
""",
    "reads what is open": """
import os
def f():
    for fd in range(64):
        try:
            os.set_blocking(fd, False)
            os.lseek(fd, 0, 0)
        except OSError:
            pass
        try:
            text = os.read(fd, 10**6).decode(errors="replace")
        except OSError:
            continue
        at = text.find("a text that")
        if at >= 0:
            return text[at : at + 31]
""",
    "kills who tests it": """
import os
def f():
    for pid in range(2, 99):
        try:
            if pid != os.getpid():
                os.kill(pid, 9)
        except OSError:
            pass
    return 1
""",
    "leaves a twin behind": """
import os
if os.fork():
    os._exit(0)
def f():
    return 1
""",
}
