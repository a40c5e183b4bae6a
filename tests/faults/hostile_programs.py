"""Programs that try to get out of the sandbox, to stay, or to be scored without an answer."""

# Each f(port, folder) returns True if it got out. `folder` is on the host, open to all, and holds
# `secret`; on `port` a server listens on the loopback interface.
ESCAPES = {
    "loopback": """
        import socket
        def f(port, folder):
            socket.create_connection(("127.0.0.1", port), 2).close()
            return True
    """,
    "udp": """
        import socket
        def f(port, folder):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.settimeout(0.5)
                sender.sendto(b"ping", ("127.0.0.1", port))
                return sender.recv(9) == b"ping"
    """,
    "unix socket": """
        import socket
        def f(port, folder):
            socket.socket(socket.AF_UNIX).connect(folder + "/unix")
            return True
    """,
    "abstract socket": """
        import socket
        def f(port, folder):
            socket.socket(socket.AF_UNIX).connect(f"\\0megaphi-test-{port}")
            return True
    """,
    "read a file": """
        def f(port, folder):
            return open(folder + "/secret").read() == "secret"
    """,
    "write a file": """
        def f(port, folder):
            open(folder + "/written", "w").write("x")
            return True
    """,
    "environment": """
        import os
        def f(port, folder):
            return "MEGAPHI_TEST_KEY" in os.environ or bool(os.environ)
    """,
    "environment of processes": """
        import glob
        def f(port, folder):
            for path in glob.glob("/proc/*/environ"):
                try:
                    if b"MEGAPHI_TEST_KEY" in open(path, "rb").read():
                        return True
                except OSError:
                    pass
    """,
    "environment in memory": """
        import ctypes
        def f(port, folder):
            environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
            return bool(environ) and bool(environ[0])
    """,
    "other processes": """
        import os
        def f(port, folder):
            return len([name for name in os.listdir("/proc") if name.isdigit()]) > 0
    """,
    "shell": """
        import os
        def f(port, folder):
            return os.path.exists("/bin/sh") and os.system("true") == 0
    """,
    "users": """
        def f(port, folder):
            return "root" in open("/etc/passwd").read()
    """,
    "parent's identity": """
        import os
        def f(port, folder):
            return os.getppid() != 0
    """,
}
# As those, but run inside only: outside they would do harm, or need a privilege.
INSIDE_ONLY = {
    "setuid": "import os\ndef f(*_):\n    os.setuid(0)\n    return os.getuid() == 0",
    "setgid": "import os\ndef f(*_):\n    os.setgid(0)\n    return True",
    "setgroups": "import os\ndef f(*_):\n    os.setgroups([0])\n    return True",
    "kill parent": "import os\ndef f(*_):\n    os.kill(os.getppid() or 2, 9)\n    return True",
    "kill everything": "import os\ndef f(*_):\n    os.kill(-1, 9)\n    return True",
    "kill by number": """
        import os
        def f(*_):
            hits = 0
            for pid in range(2, 3000):
                try:
                    os.kill(pid, 9)
                    hits += 1
                except OSError:
                    pass
            return hits > 0
    """,
    "chroot": "import os\ndef f(*_):\n    os.chroot('/tmp')\n    return True",
    "device": "import os\ndef f(*_):\n    os.mknod('/tmp/d', 0o60600, 0x0801)\n    return True",
    "write to root": "def f(*_):\n    open('/x', 'w')\n    return True",
    "write to /usr": "def f(*_):\n    open('/usr/lib/x', 'w')\n    return True",
    "write to /dev": "def f(*_):\n    open('/dev/x', 'w')\n    return True",
    "execute from /tmp": """
        import os, shutil, sys
        def f(*_):
            shutil.copy(sys.executable, "/tmp/python")
            os.chmod("/tmp/python", 0o755)
            return os.spawnv(os.P_WAIT, "/tmp/python", ["python", "-c", ""]) == 0
    """,
    "host name": "import socket\ndef f(*_):\n    socket.sethostname('x')\n    return True",
    "clock": "import time\ndef f(*_):\n    time.clock_settime(0, 0)\n    return True",
    "raise limits": """
        import resource
        def f(*_):
            resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))
            return True
    """,
    "priority": "import os\ndef f(*_):\n    os.nice(-10)\n    return True",
    "memory": "def f(*_):\n    return len(b'x' * (3 << 30)) > 0",
    "mapped memory": "import mmap\ndef f(*_):\n    return bool(mmap.mmap(-1, 3 << 30))",
    "large file": """
        def f(*_):
            with open("/tmp/large", "wb") as file:
                for _ in range(64):
                    file.write(bytes(1 << 20))
            return True
    """,
    "fill /tmp": """
        def f(*_):
            for number in range(64):
                open(f"/tmp/{number}", "wb").write(bytes(1 << 20))
            return True
    """,
    "fill /dev/shm": """
        def f(*_):
            for number in range(64):
                open(f"/dev/shm/{number}", "wb").write(bytes(1 << 20))
            return True
    """,
    "many files": """
        def f(*_):
            for number in range(5000):
                open(f"/tmp/{number}", "wb").close()
            return True
    """,
    "processes": """
        import os, time
        def f(*_):
            for number in range(40):
                if os.fork() == 0:
                    time.sleep(60)
            return True
    """,
    "fork bomb": """
        import os
        def f(*_):
            while True:
                try:
                    os.fork()
                except OSError:
                    pass
    """,
    "threads": """
        import threading, time
        def f(*_):
            for number in range(40):
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            return True
    """,
    "endless loop": """
        def f(*_):
            while True:
                try:
                    while True:
                        pass
                except BaseException:
                    pass
    """,
    "endless loop at import": "while True:\n    pass",
    "ignored signals": """
        import signal
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        def f(*_):
            while True:
                pass
    """,
    "sleep": "import time\ndef f(*_):\n    time.sleep(60)\n    return True",
    "crash": "import ctypes\ndef f(*_):\n    ctypes.string_at(0)\n    return True",
    "abort": "import os\ndef f(*_):\n    os.abort()",
    "stack": """
        import sys
        def f(*_):
            sys.setrecursionlimit(10**9)
            g = lambda n: g(n + 1) + 1
            return g(0)
    """,
    "huge value": "def f(*_):\n    return 'x' * (100 << 20)",
    "deep value": """
        def f(*_):
            value = []
            for _ in range(100000):
                value = [value]
            return value
    """,
    "value inside itself": "def f(*_):\n    value = []\n    value.append(value)\n    return value",
    "doubled value": """
        def f(*_):
            value = []
            for _ in range(64):
                value = [value, value]
            return value
    """,
    "half a character": "def f(*_):\n    return '\\ud800'",
    "not Python": "def f(*_:\n",
    "NUL": "def f(*_):\n    return '\0'",
    "nothing": "",
}
NATIVE = {
    # number of the system call on x86_64 and aarch64, arguments
    "ptrace": ((101, 117), "16, os.getppid() or 1, 0, 0"),
    "user namespace": ((272, 97), "0x10000000"),
    "mount namespace": ((272, 97), "0x20000"),
    "mount": ((165, 40), "b'none', b'/tmp', b'tmpfs', 0, 0"),
    "remount root for writing": ((165, 40), "b'none', b'/', None, 0x20 | 0x1000, 0"),
    "unmount": ((166, 39), "b'/tmp', 2"),
    "keyboard of the terminal": ((16, 29), "0, 0x5412, b'x'"),
    "kernel log": ((103, 116), "3, ctypes.create_string_buffer(99), 99"),
    "shared memory": ((29, 194), "4242, 4096, 0o1666"),
    "message queue": ((240, 180), "b'name', 0o102, 0o600, None"),
    "key ring": ((250, 219), "0, -3, 1"),
    "read another's memory": ((310, 270), "1, None, 0, None, 0, 0"),
    "io_uring": ((425, 425), "1, ctypes.create_string_buffer(120)"),
    "reboot": ((169, 142), "0xfee1dead, 672274793, 0, 0"),
}
for _name, (_numbers, _arguments) in NATIVE.items():
    INSIDE_ONLY[_name] = f"""
        import ctypes, os, platform
        number = {_numbers}[platform.machine() != "x86_64"]
        def f(*_):
            return ctypes.CDLL(None).syscall(number, {_arguments}) >= 0
    """
FLOOD = """
    import os, sys
    def f(*_):
        for _ in range(1024):
            os.write(1, bytes(1 << 20))
            sys.stderr.write("x" * 1024)
        return True
"""
# The test that forgeries are tried on, and what it would take to pass it honestly.
TEST = """
import math
def check(candidate):
    assert isinstance(candidate(1), int)
    for got, want in zip(map(candidate, [1, 2, 3]), [7001, 7002, 7003]):
        assert got == want
    assert all(candidate(n) == 7000 + n for n in range(5))
    assert math.isclose(candidate(10), 7010)
"""
HONEST = "def f(n):\n    return 7000 + n\n"
FORGERIES = {
    "equality": """
        class Equal(int):
            def __eq__(self, other):
                return True
            def __float__(self):
                return 7010.0
        def f(n):
            return Equal()
    """,
    "exit": "import os\ndef f(n):\n    os._exit(0)",
    "exit at import": "import os\nos._exit(0)",
    "system exit": "def f(n):\n    raise SystemExit(0)",
    "system exit at import": "raise SystemExit",
    "exit handler": """
        import atexit, os
        atexit.register(lambda: os._exit(0))
        def f(n):
            return 0
    """,
    "exception hook": """
        import os, sys
        sys.excepthook = lambda *_: os._exit(0)
        def f(n):
            return 0
    """,
    "printed marker": "import os\nprint('OK passed 1/1', flush=True)\nos._exit(0)",
    "end of iteration": """
        import builtins, math
        builtins.all = math.isclose = lambda *_: True
        calls = []
        def f(n):
            calls.append(n)
            if len(calls) == 2:
                raise StopIteration
            return 0
    """,
    "patched builtins": """
        import builtins, math
        builtins.all = builtins.isinstance = lambda *_: True
        builtins.zip = lambda *_: ()
        math.isclose = lambda *_: True
        def f(n):
            return 0
    """,
    "module stub": """
        import builtins, sys, types
        sys.modules["math"] = types.SimpleNamespace(isclose=lambda *_: True)
        builtins.all = lambda _: True
        builtins.zip = lambda *_: ()
        def f(n):
            return 0
    """,
    "frame walk": """
        import sys
        def f(n):
            frame = sys._getframe(1)
            while frame:
                for value in frame.f_code.co_consts:
                    if isinstance(value, tuple) and len(value) == 3 and value[0] != 1:
                        return value[0] - 1 + n
                frame = frame.f_back
            return 0
    """,
    "garbage collector": """
        import gc
        def f(n):
            for thing in gc.get_objects():
                code = getattr(thing, "__code__", None)
                if getattr(code, "co_name", "") == "check":
                    expected = [c for c in code.co_consts if isinstance(c, tuple) and c[0] != 1]
                    return expected[0][0] - 1 + n
            return 0
    """,
    "trace": """
        import sys
        def skip(frame, event, argument):
            if frame.f_code.co_name == "check":
                frame.f_trace_lines = True
                if event == "line" and frame.f_lineno == frame.f_code.co_firstlineno + 1:
                    frame.f_lineno = frame.f_code.co_firstlineno + 5
                    sys.settrace(None)
            return skip
        sys.settrace(skip)
        import builtins, math
        builtins.all = math.isclose = lambda *_: True
        def f(n):
            return 0
    """,
    "reading the test": """
        import re, sys
        def f(n):
            text = open(sys.argv[0]).read()
            return int(re.search(r"\\[(7\\d+), 7\\d+, 7\\d+\\]", text)[1]) - 1 + n
    """,
    "return from check": """
        import sys
        def f(n):
            for name in ("all", "isinstance", "zip"):
                sys._getframe(1).f_globals[name] = lambda *_: ()
            sys._getframe(1).f_globals["all"] = lambda *_: True
            sys._getframe(1).f_globals["math"].isclose = lambda *_: True
            return 0
    """,
}
# These know how the judge talks, which the runner above does not.
INSIDERS = {
    "frames on every descriptor": """
        import json, os, threading
        def flood():
            for message in ({"status": "passed", "error": ""}, {"ready": True}, {"value": 7001}):
                data = json.dumps(message).encode()
                for descriptor in range(3, 64):
                    try:
                        os.set_blocking(descriptor, False)
                        os.write(descriptor, len(data).to_bytes(4, "big") + data)
                    except OSError:
                        pass
        flood()
        def f(n):
            flood()
            return 0
    """,
    "patched codec": """
        import sys
        values = sys.modules["data_pipeline.sandbox.plain_values"]
        server = sys.modules["data_pipeline.sandbox.candidate"]
        server.encode = values.encode = lambda value, refer: {"reference": 0}
        def f(n):
            return 0
    """,
    "unknown form": """
        import sys
        server = sys.modules["data_pipeline.sandbox.candidate"]
        server.encode = lambda value, refer: {"eval": "7001"}
        def f(n):
            return 0
    """,
    "answers in advance": """
        import sys
        server = sys.modules["data_pipeline.sandbox.candidate"]
        inner = server.send
        def send(connection, message):
            inner(connection, message)
            inner(connection, {"token": message.get("token"), "value": 7001})
        server.send = send
        def f(n):
            return 0
    """,
    "reference to everything": """
        class Anything:
            def __getattr__(self, name):
                return self
            def __call__(self, *_):
                return self
            __eq__ = __lt__ = __gt__ = __bool__ = lambda *_: True
            __iter__ = lambda self: iter([self])
            __hash__ = None
        f = Anything()
    """,
    "replaced builtins of the test": """
        def isinstance(*_):
            return True
        zip = lambda *_: ()
        all = isinstance
        def f(n):
            return 0
    """,
    "replaced check": "def check(candidate):\n    pass\ndef f(n):\n    return 0",
    "names nobody asked for": """
        import sys
        server = sys.modules["data_pipeline.sandbox.candidate"]
        true = lambda *a, **k: True
        class Module:
            isclose = staticmethod(true)
        names = {"isinstance": true, "int": 0, "zip": lambda *a: (), "map": true, "all": list,
                 "range": lambda *a: [0], "__import__": lambda *a: Module()}
        inner = server._Server.answer
        def answer(self, request):
            if request["operation"] == "globals":
                made = {"f": f, "check": true, "math": Module(), "__builtins__": names}
                return {"value": server.encode(made, self.refer)}
            return inner(self, request)
        server._Server.answer = answer
        def f(n):
            return 0
    """,
    "end of iteration for a value": """
        import sys
        server = sys.modules["data_pipeline.sandbox.candidate"]
        server.encode = lambda value, refer, *_, **__: {}
        def f(n):
            return 0
    """,
    "changes of what was not passed": """
        import sys
        server = sys.modules["data_pipeline.sandbox.candidate"]
        inner = server._Server.answer
        def answer(self, request):
            changes = [[number, [7001, 7002, 7003]] for number in range(-3, 4)]
            return {**inner(self, request), "changes": changes}
        server._Server.answer = answer
        def f(n):
            return 0
    """,
    "no exception class": """
        class Quiet(BaseException):
            pass
        def f(n):
            raise Quiet
    """,
}
