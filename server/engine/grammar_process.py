"""Compiles grammars where nobody is hurt by them: a process that forks a child for each.

Run as a program by ``server.engine.grammars``, with the tokenizer as its standard input and the number of a
Unix socket, each message of which brings the socket of one job. The child of a job compiles under limits that
the kernel keeps (time, memory, priority), whatever the compiler is doing, and answers in JSON. A job whose
asker goes away is killed.

Knows xgrammar, which imports torch, and nothing of this program: a fork shares that with its parent.
"""

import array
import contextlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from typing import Any, NamedTuple

LENGTH = struct.Struct("!I")
# The end of a peer, without the data that it may send before; elsewhere than on Linux a job then runs on to
# its limit.
GONE = getattr(select, "POLLRDHUP", 0)
# Beside cores that an engine keeps busy 50 ms of work take 0.4 s so. At 19 they take 8 s: the kernel leaves
# it a hundredth of a core.
NICE = 5
# Steps of the two walks through a grammar that show what a token costs; see ``_walk``.
RANDOM_STEPS, REPEATED_STEPS = 64, 320
SLOW_STEP_S = 0.02
SLOW_STEPS = 3  # one may be a moment in which something else ran
GROWTH, GROWN_S = 3.0, 0.001


def receive(sock: socket.socket) -> bytes:
    """One message; EOFError where the peer is gone."""
    (length,) = LENGTH.unpack(_exactly(sock, LENGTH.size))
    return _exactly(sock, length)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        if not (piece := sock.recv(count - len(data))):
            raise EOFError
        data += piece
    return bytes(data)


def serve(control: socket.socket) -> None:
    """Forks a child for each socket that comes through ``control``. EOFError when that ends."""
    import xgrammar

    tokenizer = xgrammar.TokenizerInfo.deserialize_json(sys.stdin.read())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    poll = select.poll()
    poll.register(control, select.POLLIN)
    jobs: dict[int, Job] = {}  # by both of their descriptors
    while True:
        for fd, _ in poll.poll():
            if fd == control.fileno():
                if (job := _start(control, tokenizer, jobs)) is None:
                    continue
                for number, events in ((job.socket.fileno(), GONE), (job.process, select.POLLIN)):
                    jobs[number] = job
                    poll.register(number, events)
            elif fd in jobs:  # its asker has gone, or its child has ended
                job = jobs[fd]
                for number in (job.socket.fileno(), job.process):
                    poll.unregister(number)
                    del jobs[number]
                job.end()


class Job(NamedTuple):
    """``process`` is a pidfd of the child."""

    socket: socket.socket
    process: int

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.process, signal.SIGKILL)
        self.socket.close()
        os.close(self.process)


def _start(control: socket.socket, tokenizer: Any, others: "dict[int, Job]") -> "Job | None":
    """The next job; None where it is done already. EOFError where ``control`` has ended, with which all
    children end."""
    _, ancillary, _, _ = control.recvmsg(1, socket.CMSG_LEN(array.array("i").itemsize))
    if not ancillary:
        raise EOFError
    job = socket.socket(fileno=array.array("i", ancillary[0][2])[0])
    if not (child := os.fork()):
        control.close()
        for other in others.values():  # or its asker would not see the end of its answer before ours
            other.socket.close()
        _child(job, tokenizer)
    try:
        return Job(job, os.pidfd_open(child))
    except ProcessLookupError:
        job.close()
        return None


def _child(job: socket.socket, tokenizer: Any) -> None:
    """Answers one job, and ends."""
    try:
        job.setblocking(True)
        asked = json.loads(receive(job))
        # Its default action ends a process that is in the middle of anything, at so many seconds of processor
        # time: the clock tells of the machine and not of the grammar, and who asks looks at it.
        signal.setitimer(signal.ITIMER_PROF, asked["seconds"])
        os.nice(NICE)
        most = _address_space() + asked["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        job.sendall(b"s")  # it has begun
        try:
            answer: dict[str, Any] = {"error": _judge(tokenizer, asked)}
        except TooMuch as exc:
            answer = {"error": str(exc), "too_much": True}
        except MemoryError:
            answer = {"error": "it takes too much memory", "too_much": True}
        except Exception as exc:
            answer = {"error": _first_line(str(exc)), "too_much": "bad_alloc" in str(exc)}
        job.sendall(json.dumps(answer).encode())
    except (OSError, EOFError):
        pass
    finally:
        os._exit(0)


class TooMuch(Exception):
    """It could be compiled, but costs more than is allowed."""


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _first_line(text: str) -> str:
    """Of an error of the compiler, without the place in its source that comes before it."""
    line = text.strip().split("\n")[0]
    return line.rpartition("] ")[2].rpartition(".cc:")[2].partition(": ")[2] or line


def _judge(tokenizer: Any, asked: "dict[str, Any]") -> "str | None":
    """Why one of the grammars cannot be used; None if all can. Raises TooMuch, and what xgrammar does."""
    for kind, spec in asked["specs"]:
        compiled = _compile(tokenizer, kind, spec, asked)
        if compiled.memory_size_bytes > asked["largest"]:
            raise TooMuch("it is too large when it is compiled")
        if (error := _walk(compiled, tokenizer)) is not None:
            return error
    return None


def _compile(tokenizer: Any, kind: str, spec: str, asked: "dict[str, Any]") -> Any:
    import xgrammar

    compiler = xgrammar.GrammarCompiler(tokenizer, max_threads=1, cache_enabled=False)
    if kind == "json":
        blanks = asked["any_whitespace"]
        separators = None if blanks else (",", ":")
        return compiler.compile_json_schema(spec, any_whitespace=blanks, separators=separators)
    if kind == "regex":
        return compiler.compile_regex(spec)
    if kind == "lark":
        return compiler.compile_lark(spec)
    if kind == "grammar":
        return compiler.compile_grammar(spec)
    tag = json.loads(spec)
    if "structures" not in tag:
        return compiler.compile_structural_tag(spec)
    items = [
        xgrammar.StructuralTagItem(begin=s["begin"], schema=json.dumps(s["schema"]), end=s["end"])
        for s in tag["structures"]
    ]
    return compiler.compile_structural_tag(items, tag["triggers"])


def _walk(compiled: Any, tokenizer: Any) -> "str | None":
    """Follows the grammar as an answer would: at random, and by repeating a token for as long as it may.

    The engine does this for every token between two steps of everybody's, so a grammar may be compiled fast
    and still hold up all: what is ambiguous costs more with each token, up to its third power.
    """
    import numpy as np
    import xgrammar

    mask = xgrammar.allocate_token_bitmask(1, tokenizer.vocab_size)
    words = mask.numpy().view(np.uint8)
    for steps, repeat in ((RANDOM_STEPS, False), (REPEATED_STEPS, True)):
        matcher = xgrammar.GrammarMatcher(compiled)
        stops = set(matcher.stop_token_ids)
        chance = np.random.default_rng(0)
        took: list[float] = []
        last = -1
        for step in range(steps):
            began = time.process_time()
            matcher.fill_next_token_bitmask(mask)
            seconds = time.process_time() - began
            allowed = np.flatnonzero(np.unpackbits(words, bitorder="little"))
            if not len(allowed):
                return "no answer can follow it" if step == 0 else None
            if not (repeat and last in allowed):
                last = int(chance.choice(allowed))
                if last in stops and len(allowed) > 1:
                    last = int(next(token for token in allowed if token not in stops))
            began = time.process_time()
            matcher.accept_token(last)
            took.append(seconds + time.process_time() - began)
            if matcher.is_terminated():
                break
        _bound(took)
    return None


def _bound(took: "list[float]") -> None:
    """Raises TooMuch for steps of ``took`` that are slow, or become slower with each."""
    if sum(seconds > SLOW_STEP_S for seconds in took) >= SLOW_STEPS:
        raise TooMuch("each token of an answer takes too long to check")
    if len(took) >= REPEATED_STEPS:
        early, late = (sorted(took[at : at + 32])[16] for at in (len(took) // 4, len(took) - 32))
        if late > GROWN_S and late > GROWTH * early:
            raise TooMuch("each token takes longer to check than the one before; it is ambiguous")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends with its parent
    with contextlib.suppress(EOFError, ConnectionError), socket.socket(fileno=int(sys.argv[1])) as given:
        serve(given)
    sys.exit(0)
