"""What lies between the fleet's processes and what they talk to, in a process of its own: links to Redis that can be cut,
stalled and slowed down, and an upload host that counts and can fail in every way.

Wire is its handle; everything else runs in the child. Each PUT is a line "PATH STATUS SHA256" of the log: STATUS 0 was stored,
but the answer never came."""
import asyncio
import contextlib
import ctypes
import hashlib
import multiprocessing
import os
import re
import signal
import socket
import struct

FORBIDDEN = "forbidden/"  # paths below it are answered 403


class Link:
    """A listening port whose connections lead to a Unix socket."""

    def __init__(self, target):
        self.target, self.delay, self.open = target, 0, set()
        self.flows = asyncio.Event()
        self.flows.set()

    async def pump(self, reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await self.flows.wait()
                if self.delay:
                    await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()

    async def serve(self, reader, writer):
        writers = [writer]
        self.open.add(writer)
        try:
            await self.flows.wait()
            far, back = await asyncio.open_unix_connection(self.target)
            writers.append(back)
            self.open.add(back)
            await asyncio.wait([asyncio.ensure_future(self.pump(*ends)) for ends in ((reader, back), (far, writer))],
                               return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass
        for w in writers:
            self.open.discard(w)
            w.transport.abort()

    def reset(self):
        """What is under way is lost, and both ends hear of it."""
        for writer in list(self.open):
            reset(writer)

    def set(self, target=None, stalled=None, delay=None):
        self.target = target or self.target
        if stalled is not None:
            (self.flows.clear if stalled else self.flows.set)()
        if delay is not None:
            self.delay = delay


def reset(writer):
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Sink:
    """Keeps what is PUT. fault: None, a status, or one of hang, reset, mute (stored, never answered), slow, full."""

    def __init__(self, folder, log, fills):
        self.folder, self.log, self.fills, self.fault = folder, open(log, "a", buffering=1), fills, None
        self.healed = asyncio.Event()

    def set(self, fault):
        if self.fault == "full" and self.fills:
            os.unlink(self.folder + "/ballast")
        if self.fault == "hang":
            self.healed.set()
            self.healed = asyncio.Event()
        self.fault = fault
        if fault == "full" and self.fills:
            with open(self.folder + "/ballast", "wb", buffering=0) as f, contextlib.suppress(OSError):
                while f.write(bytes(1 << 16)):
                    pass

    def store(self, path, body):
        if self.fault == "full" and not self.fills:
            return 507
        whole = "%s/%s" % (self.folder, path)
        try:
            with open(whole + ".part", "wb") as f:
                f.write(body)
            os.replace(whole + ".part", whole)
            return 201
        except OSError:
            return 507

    async def judge(self, path, body):
        """The status; 0: stored, but the connection is to break; -1: it is to break."""
        if path.startswith(FORBIDDEN):
            return 403
        if isinstance(self.fault, int):
            return self.fault
        if self.fault == "hang":
            await self.healed.wait()
        if self.fault == "slow":
            await asyncio.sleep(0.5)
        if self.fault in ("hang", "reset"):
            return -1
        status = self.store(path, body)
        return 0 if status == 201 and self.fault == "mute" else status

    async def answer(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        path = re.match(rb"PUT /([\w./-]+) HTTP/1.1\r\n", head)[1].decode()
        body = await reader.readexactly(int(re.search(rb"(?i)\ncontent-length: *(\d+)", head)[1]))
        status = await self.judge(path, body)
        self.log.write("%s %d %s\n" % (path, status, hashlib.sha256(body).hexdigest()))
        if status <= 0:
            return reset(writer)
        wait = b"Retry-After: 1\r\n" if status == 429 else b""
        writer.write(b"HTTP/1.1 %d so\r\n%sContent-Length: 0\r\n\r\n" % (status, wait))
        await writer.drain()

    async def serve(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while not writer.transport.is_closing():
                await self.answer(reader, writer)
        writer.close()


class Wire:
    """links: name -> Unix socket. After the start .ports has every link's port, and that of "sink"."""

    def __init__(self, links, folder, log, fills):
        self.pipe, far = multiprocessing.Pipe()
        self.child = multiprocessing.Process(target=run, args=(far, links, folder, log, fills), daemon=True)
        self.child.start()
        self.ports = self.pipe.recv()

    def set(self, name, **what):
        self.tell(name, "set", what)

    def reset(self, name):
        self.tell(name, "reset", {})

    def tell(self, *order):
        self.pipe.send(order)
        error = self.pipe.recv()
        assert not error, error


def run(pipe, links, folder, log, fills):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    asyncio.run(main(pipe, links, folder, log, fills))


async def main(pipe, links, folder, log, fills):
    parts, ports = {name: Link(target) for name, target in links.items()}, {}
    parts["sink"] = Sink(folder, log, fills)
    for name, part in parts.items():
        server = await asyncio.start_server(part.serve, "0.0.0.0", 0)
        ports[name] = server.sockets[0].getsockname()[1]
    pipe.send(ports)
    end = asyncio.Event()

    def obey():
        try:
            name, method, what = pipe.recv()
        except EOFError:
            return end.set()
        try:
            pipe.send(getattr(parts[name], method)(**what))
        except Exception as e:
            pipe.send(repr(e))

    asyncio.get_running_loop().add_reader(pipe.fileno(), obey)
    await end.wait()
