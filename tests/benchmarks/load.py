"""Many visitors at once: how long each action takes, what fails, and what memory does.

Starts the dashboard in a process of its own and drives it over HTTP as browsers do. One visitor
analyses all the time; the others click, compare, continue prompts, open the study and download it.
Prints percentiles of each action, waiting included, errors, answers that were not the visitor's
own, and memory and threads of the server.

    python tests/benchmarks/load.py --users 50 --seconds 60 --model bundled
"""

from __future__ import annotations

import argparse
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from gradio_client import Client, handle_file

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS, PATIENCE_SECONDS = 180, 300
# Of a visitor's actions; the rest are clicks, which answer without the model.
SHARES = {"compare": 0.03, "export": 0.12, "pair": 0.05}
THINKING_SECONDS = (1.0, 5.0)


class Record:
    """Seconds of every action, errors, and answers that were somebody else's."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.errors: list[str] = []
        self.mixed_up: list[str] = []

    def timed(self, client: Client, name: str, **values: Any) -> Any:
        """Call an endpoint; None where it failed."""
        started = time.monotonic()
        try:
            answer = client.predict(api_name=f"/{name}", **values)
        except Exception as error:
            self.errors.append(f"{name}: {error}")
            return None
        self.seconds[name].append(time.monotonic() - started)
        if "ls-alert" in str(answer):
            told = re.search(r'role="alert">([^<]*)', str(answer))
            self.errors.append(f"{name}: {told[1] if told else 'an alert'}")
        return answer

    def print(self) -> None:
        print(
            f"{'action':<10} {'calls':>6} {'median s':>9} {'90 % s':>8} {'99 % s':>8} {'most s':>8}"
        )
        for name, seconds in sorted(self.seconds.items()):
            median, high, higher = np.percentile(seconds, (50, 90, 99))
            print(
                f"{name:<10} {len(seconds):>6} {median:>9.2f} {high:>8.2f} {higher:>8.2f} "
                f"{max(seconds):>8.2f}"
            )
        print(f"errors: {len(self.errors)}; answers mixed up: {len(self.mixed_up)}")
        for line in [*self.errors, *self.mixed_up][:5]:
            print(f"  {line[:200]}")


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        environment = {**os.environ, "GRADIO_TEMP_DIR": f"{scratch}/gradio"}
        if options.model != "bundled":
            environment["LAYERSHAP_CACHE"] = f"{scratch}/cache"
        with (Path(scratch) / "server.log").open("w+") as log:
            server = subprocess.Popen(
                [sys.executable, str(ROOT / "app.py"), "--port", str(port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            try:
                _drive(options, f"http://127.0.0.1:{port}", psutil.Process(server.pid))
            finally:
                server.terminate()
                server.wait(30)
            files = [file for file in Path(scratch, "gradio").rglob("*") if file.is_file()]
            print(f"download files left: {len(files)}")
            log.seek(0)
            print(f"tracebacks in the server's log: {log.read().count('Traceback')}")


def _drive(options: argparse.Namespace, address: str, server: psutil.Process) -> None:
    first = _first_client(address)
    memory = {"start": _memory(server)}
    warm_up = Record()
    described = re.search(r"(\d+) layers", str(_load(warm_up, first, options)))
    if described is None:
        raise SystemExit(f"The model could not be loaded: {warm_up.errors}")
    n = int(described[1])
    warm_up.timed(first, "analyze", evaluations=options.evaluations, strata="")
    warm_up.timed(first, "compare", text="1")
    warm_up.timed(first, "export")
    if warm_up.errors:
        raise SystemExit(f"The warm-up failed: {warm_up.errors[0]}")
    clients = [first, *(_client(address) for _ in range(options.users - 1))]
    arrival = Record()
    _together([partial(_load, arrival, client, options) for client in clients[1:]])
    print(f"{options.users} visitors, {options.model} model, {n} layers; loading, all at once:")
    arrival.print()
    memory["after warm-up"] = _memory(server)
    halves = []
    record = Record()
    for half in range(2):
        end = time.monotonic() + options.seconds / 2
        visits = [
            partial(_visitor, record, client, random.Random(f"{half} {number}"), n, end)
            for number, client in enumerate(clients[1:])
        ]
        _together([partial(_analyst, record, first, options, end), *visits])
        halves.append(_memory(server))
    memory["half way"], memory["end"] = halves
    print(f"\n{options.seconds:g} s of traffic, while one visitor analyses:")
    record.print()
    calls = sum(map(len, record.seconds.values()))
    print(f"{calls} calls, {calls / options.seconds:.1f} a second")
    for name, (megabytes, threads) in memory.items():
        print(f"memory {name}: {megabytes:,.0f} MB, {threads} threads")


def _visitor(record: Record, client: Client, rng: random.Random, n: int, end: float) -> None:
    """Clicks, and now and then something that takes the model, with pauses to look at it."""
    while time.monotonic() < end:
        time.sleep(rng.uniform(*THINKING_SECONDS))
        dropped = sorted(rng.sample(range(1, n - 1), rng.randint(1, 2)))
        text = ", ".join(map(str, dropped))
        answer = record.timed(client, "select", text=text)
        if answer is not None and answer[0] != text:
            record.mixed_up.append(f"asked for {text}, was told {answer[0]}")
        chance = rng.random()
        for name, share in SHARES.items():
            chance -= share
            if chance < 0:
                # Few different sets, so that several visitors ask for the same at once.
                same = str(rng.randint(1, 3))
                values = {
                    "compare": {"text": same},
                    "pair": {"first": same, "second": str(n - 2)},
                    "export": {},
                }
                record.timed(client, name, **values[name])
                break


def _analyst(record: Record, client: Client, options: argparse.Namespace, end: float) -> None:
    while time.monotonic() < end:
        seed = len(record.seconds["analyze"]) + 1
        record.timed(client, "analyze", evaluations=options.evaluations, strata="", seed=seed)


def _load(record: Record, client: Client, options: argparse.Namespace) -> Any:
    source = {"model_source": "", "revision": "", "text_file": None}
    if options.model != "bundled":
        source |= {"model_from": "Local folder", "model_source": options.model}
    if options.text:
        source |= {"text_from": "Upload", "text_file": handle_file(str(options.text))}
    return record.timed(
        client,
        "load",
        **source,
        blocks=options.blocks,
        block_length=options.block_length,
        held_out_blocks=options.blocks,
    )


def _client(address: str) -> Client:
    return Client(address, verbose=False, httpx_kwargs={"timeout": PATIENCE_SECONDS})


def _first_client(address: str) -> Client:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            return _client(address)
        except Exception as error:
            if time.monotonic() > end:
                raise SystemExit("The dashboard did not start.") from error
            time.sleep(0.5)


def _together(jobs: list) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _memory(server: psutil.Process) -> tuple[float, int]:
    return server.memory_info().rss / 1e6, server.num_threads()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60, help="of traffic, after a warm-up")
    parser.add_argument("--model", default="bundled", help='"bundled", or a local folder')
    parser.add_argument("--evaluations", type=int, default=32, help="of each analysis")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--text", type=Path, help="a file instead of the bundled text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
