"""A process that imports everything once and then forks: a command that starts often, or is killed, does not wait for its imports each time."""
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import SimpleNamespace

SELDOM = "import gc; gc.set_threshold(50_000, 20, 100)\n"      # as in conftest
LOOP = """
import json, os, sys
for line in sys.stdin:
    out, errors, environments, arguments = json.loads(line)
    children = []
    for environment in environments:
        if not (child := os.fork()):
            os.environ.update(environment)
            for path, stream in ((out, 1), (errors, 2)): os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream)
            sys.exit(do(*arguments))
        children.append(child)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


@contextmanager
def nursery(code: str, *arguments: str, env: dict[str, str]) -> Iterator[SimpleNamespace]:
    """`code` defines `do`; `start(...)` gives the numbers of the forks that do it, one an environment, and `end()` waits for their exit codes."""
    with subprocess.Popen([sys.executable, "-c", SELDOM + code + LOOP, *arguments], env=env, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as parent:
        def start(*given, out=os.devnull, errors=os.devnull, environments=None) -> list[int]:
            print(json.dumps([str(out), str(errors), environments or [{}], list(map(str, given))]), file=parent.stdin, flush=True)
            return json.loads(parent.stdout.readline())
        yield SimpleNamespace(start=start, end=lambda: json.loads(parent.stdout.readline()))
        parent.stdin.close()


def ranks(size: int) -> list[dict[str, str]]:
    """The environment of each of some processes that work together, as torchrun sets it."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server: port = server.getsockname()[1]
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [place | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(size)]
