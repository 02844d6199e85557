"""The server's cost of sending a token, against a bare `websockets` server that sends the same bytes.

    python benchmarks/streaming.py [--only 1000x1000 --repeats 1]

The engine is the dummy, unlimited unless a pace is set. A case "1000x100" is 1,000 streams over 100 connections. CPU
time is that of the server's process alone, with all its work for a token: planning steps, messages to the executor's
process, text, encoding, writing. It is read from /proc while all streams run: all requests are accepted, none has
finished. The bare server sends frames of Descant's mean size, one per stream in turn, on the same event loop, and does
no other work. The two run in turns; ratios are medians over the turns:
- *per frame*: Descant's frames per CPU second, divided by the bare server's;
- *per token*: Descant's tokens per CPU second, divided by the bare server's with one token in each frame.
*ms apart* is the time between two frames of a stream: tokens that arrive in it share a frame.
Memory is the growth of a fresh server's resident set by 1,000 idle connections, after a garbage collection.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from report import RESULTS, Report, figures, median, paired_ratio, spread, stage, table
from stream_client import BINARY, TEXT, Reader, Span, resident_bytes

from descant_client.protocol import JSON_SUBPROTOCOL, MSGPACK_SUBPROTOCOL, Generate, encoder_for

CASES = ["1x1", "100x1", "100x100", "1000x1", "1000x100", "1000x1000"]
ENCODINGS = {"json": JSON_SUBPROTOCOL, "msgpack": MSGPACK_SUBPROTOCOL}
NUM_IDLE = 1000
NUM_FILES = 4096
MAX_TOKENS = 10**6  # more than a measurement needs
AIM_RATIO, AIM_IDLE_BYTES = 0.7, 40 * 1024


@dataclass
class Case:
    """A number of streams over a number of connections in one encoding, and its measurements."""

    num_streams: int
    num_connections: int
    encoding: str
    ours: list[Span] = field(default_factory=list)
    bare: list[Span] = field(default_factory=list)

    @property
    def opcode(self) -> int:
        """WebSocket opcode of a frame in this encoding."""
        return TEXT if self.encoding == "json" else BINARY

    def cells(self) -> list[str]:
        """Return the line of the table."""
        tokens = [one.num_tokens / one.server_cpu_s for one in self.ours]
        frames = [one.num_frames / one.server_cpu_s for one in self.ours]
        bare = [one.num_frames / one.server_cpu_s for one in self.bare]
        return [
            f"{self.num_streams} over {self.num_connections}, {self.encoding}",
            figures(median([one.num_tokens / one.seconds for one in self.ours])),
            figures(median(tokens)),
            spread(tokens),
            figures(median([1e6 / rate for rate in tokens])),
            figures(median([1e6 / rate for rate in bare])),
            figures(median([one.num_tokens / one.num_frames for one in self.ours])),
            f"{median([one.num_bytes / one.num_frames for one in self.ours]):.0f}",
            figures(median([1e3 * self.num_streams * one.seconds / one.num_frames for one in self.ours])),
            paired_ratio(frames, bare),
            paired_ratio(tokens, bare),
            f"≥ {AIM_RATIO}" if self.num_streams == 1000 else "–",
            f"{median([one.reader_cpu_s / one.seconds for one in [*self.ours, *self.bare]]):.0%}",
        ]


HEADS = (
    "streams over connections",
    "tokens/s",
    "per core",
    "spread",
    "CPU µs/token",
    "bare µs/frame",
    "tokens/frame",
    "bytes/frame",
    "ms apart",
    "of bare, per frame",
    "per token",
    "aim",
    "reader busy",
)


@dataclass(frozen=True)
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int

    def collect_garbage(self) -> None:
        """Make the server collect garbage, and wait until it has had the time."""
        self.process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)


def parse_case(text: str) -> tuple[int, int]:
    """Return streams and connections of "1000x100". Raises ArgumentTypeError."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None or not 1 <= int(found[2]) <= int(found[1]) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not STREAMSxCONNECTIONS, at most 1000, a stream for each")
    return int(found[1]), int(found[2])


def main(options: argparse.Namespace) -> None:
    """Measure, print and store."""
    report = Report("streaming", options)
    print(report.header())
    raise_file_limit()
    cases = [Case(streams, at, encoding) for streams, at in options.only for encoding in options.encodings]
    with ExitStack() as stack:
        ours, bare = (stack.enter_context(started(kind, options.pace)) for kind in ("descant", "bare"))
        with stage("memory"):
            idle_bytes = {"descant": bytes_per_connection(ours, "/ws"), "websockets": bytes_per_connection(bare, "/")}
        for turn in range(1, options.repeats + 1):
            with stage(f"turn {turn} of {options.repeats}"):
                for case in cases:
                    measure(case, ours, bare, options.seconds)
    print(f"\n{table(HEADS, [case.cells() for case in cases])}")
    per_connection = ", ".join(f"{name} {size / 1024:.1f} KiB" for name, size in idle_bytes.items())
    print(f"\nan idle connection: {per_connection} (aim: ≤ {AIM_IDLE_BYTES // 1024} KiB)")
    results = {"bytes_per_idle_connection": idle_bytes, "cases": [asdict(case) for case in cases]}
    print(f"\nstored: {report.save(results, options.results)}")


def raise_file_limit() -> None:
    """Raise the limit of open files to one per connection, for this process and its children. Raises SystemExit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < NUM_FILES:
        raise SystemExit(f"refused: only {hard} open files are allowed here, {NUM_FILES} are needed")
    if soft < NUM_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (NUM_FILES, hard))


@contextmanager
def started(kind: str, pace: float = 0.0) -> Iterator[Server]:
    """Run a server that is ready, until the end of the block."""
    command = [sys.executable, str(Path(__file__).with_name("stream_server.py")), kind, str(pace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            assert process.stdout is not None, "it was asked for"
            port = process.stdout.readline().strip()
            if not port:
                raise SystemExit(f"the {kind} server did not start")
            yield Server(process, int(port))
        finally:
            process.terminate()


def bytes_per_connection(server: Server, path: str) -> float:
    """Return the bytes that an idle connection adds to the memory of a fresh server."""
    with Reader(server.port, server.process.pid) as first:  # allocations of the first connection that are not repeated
        first.connect(1, path, MSGPACK_SUBPROTOCOL)
        first.read_for(0.2)
        server.collect_garbage()
        before = resident_bytes(server.process.pid)
        with Reader(server.port, server.process.pid) as reader:
            reader.connect(NUM_IDLE, path, MSGPACK_SUBPROTOCOL)
            reader.read_for(0.2)
            server.collect_garbage()
            return (resident_bytes(server.process.pid) - before) / NUM_IDLE


def measure(case: Case, ours: Server, bare: Server, seconds: float) -> None:
    """Run a case on both servers, Descant first: its mean frame size is that of the bare server's frames."""
    encode = encoder_for(ENCODINGS[case.encoding])
    requests: list[bytes] = []
    for index in range(case.num_streams):
        message = encode(
            Generate(request_id=f"r{index}", prompt="Sing.", max_tokens=MAX_TOKENS, ignore_eos=True, seed=index)
        )
        requests.append(message if isinstance(message, bytes) else message.encode())
    wait_until_idle(ours)
    span = run(case, ours, "/ws", requests, seconds)
    case.ours.append(span)
    size = round(span.num_bytes / span.num_frames)
    room = f"/{case.encoding}-{case.num_connections}-{len(case.ours)}"
    path = f"{room}?streams={case.num_streams}&bytes={size}&text={int(case.opcode == TEXT)}"
    case.bare.append(run(case, bare, path, requests, seconds / 2))


def run(case: Case, server: Server, path: str, requests: list[bytes], seconds: float) -> Span:
    """Start all streams and measure for some seconds while all of them run."""
    with Reader(server.port, server.process.pid) as reader:
        reader.connect(case.num_connections, path, ENCODINGS[case.encoding])
        reader.send(case.opcode, requests)
        reader.read_until_running(case.num_streams)
        return reader.measure(seconds)


def wait_until_idle(server: Server) -> None:
    """Wait until the server has no streams left. Raises TimeoutError."""
    until = time.perf_counter() + 30.0
    while time.perf_counter() < until:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health") as answer:
            health = json.load(answer)
        if not health["sequences"] and not health["sessions"]:
            return
        time.sleep(0.05)
    raise TimeoutError("streams of the last case are still there")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=parse_case, default=list(map(parse_case, CASES)), metavar="CASE")
    parser.add_argument("--encodings", nargs="+", choices=list(ENCODINGS), default=list(ENCODINGS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement of ours; half for the other")
    parser.add_argument("--pace", type=float, default=0.0, help="tokens per second of a stream; 0: as many as can be")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON file goes")
    main(parser.parse_args())
