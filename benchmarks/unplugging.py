"""Two machines, one of which is unplugged and killed in turn, and whether the server lives through it.

    python benchmarks/unplugging.py                  five minutes; root, because the machines are network namespaces
    python benchmarks/unplugging.py --seconds 60 --json unplugging.json

`weft serve --join-address` runs in one namespace and `weft worker` in the other. A client asks all the time. In turn
the cable is pulled and put back, the other machine's worker is killed or stopped, its `weft worker` is killed and
started again, and this machine's own rank is killed. Every answer must be what it was before, and each loss one loss in
/metrics. Exits with 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil

from weft.launch.keys import key_of
from weft.launch.namespaces import NamespaceLauncher

WEFT = (sys.executable, "-m", "weft.cli.main")
SECRET, PORT, JOIN = "a secret between us", 8000, 7000
AWAY = 7.0  # seconds that a cable is out: longer than silence is forgiven
PATIENCE = 60.0  # seconds until all is well again
ASKED = {"prompt": "The for statement is used to", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


class Machines:
    """The server's and the other one. `said`: where their terminals are kept."""

    def __init__(self, said: Path) -> None:
        self.network = NamespaceLauncher()
        self.network.build(2)
        self._said = said.open("ab")
        self.server = self._start(0, "serve", "--tp", "2", "--threads", "1", "--overlap", "serial", "--port", str(PORT),
                                  "--join-address", f"{self.address}:{JOIN}")  # fmt: skip
        self.other = self.join()

    @property
    def address(self) -> str:
        """Of the server, for the other machine."""
        return self.network.data_address(0)

    def _start(self, place: int, *arguments: str) -> subprocess.Popen[bytes]:
        command = [*self.network.prefix(place), *WEFT, *arguments]
        token = key_of(SECRET).token if place else SECRET
        return subprocess.Popen(
            command, stdout=self._said, stderr=self._said, stdin=subprocess.DEVNULL,
            env=os.environ | {"WEFT_TOKEN": token, "COLUMNS": "200"},
        )  # fmt: skip

    def join(self) -> subprocess.Popen[bytes]:
        """`weft worker` on the other machine."""
        return self._start(1, "worker", "--join", f"{self.address}:{JOIN}")

    def pull(self) -> None:
        """The cable, out and in again."""
        self._link("down")
        time.sleep(AWAY)
        self._link("up")

    def _link(self, state: str) -> None:
        subprocess.run(["ip", "-n", self.network.prefix(0)[-1], "link", "set", "data0", state], check=True)

    def kill_worker(self) -> None:
        """The other machine's rank."""
        os.kill(_child(self.other), signal.SIGKILL)

    def stop_worker(self) -> None:
        """The same, stopped as by a debugger."""
        os.kill(_child(self.other), signal.SIGSTOP)

    def kill_own(self) -> None:
        """The server's own rank."""
        os.kill(_child(self.server), signal.SIGKILL)

    def kill_machine(self) -> None:
        """`weft worker` with its rank, as if the power went; another one comes a little later."""
        self.other.kill()
        self.other.wait()
        time.sleep(AWAY)
        self.other = self.join()

    def close(self) -> None:
        """Ends everything."""
        for process in (self.server, self.other):
            process.kill()
            process.wait()
        self._said.close()
        self.network.close()
        self.network.remove()


def _child(process: subprocess.Popen[bytes]) -> int:
    """The worker below a command."""
    return int(psutil.Process(process.pid).children(recursive=True)[-1].pid)


def _enter(namespace: str) -> None:
    """Has this thread's sockets be of a namespace."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), "the namespace can't be entered")


class Trial:
    """Asks, harms, and counts. Its requests are sent by threads inside the server's namespace."""

    def __init__(self, machines: Machines) -> None:
        self.machines = machines
        self.wrong: list[str] = []
        self.harmed: Counter[str] = Counter()
        self.answers = 0
        self.over = threading.Event()
        name = machines.network.prefix(0)[-1]
        self._looking = ThreadPoolExecutor(1, initializer=_enter, initargs=(name,))
        self._asking = ThreadPoolExecutor(1, initializer=_enter, initargs=(name,))
        self.expected = ""

    def look(self, path: str) -> httpx2.Response:
        """GET."""
        url = f"http://127.0.0.1:{PORT}{path}"
        return self._looking.submit(lambda: httpx2.get(url, timeout=10, trust_env=False)).result(20)

    def until(self, what: Callable[[], bool], named: str) -> None:
        """Waits for it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.machines.server.poll() is not None:
                break
            with suppress(httpx2.TransportError):
                if what():
                    return
            time.sleep(0.05)
        raise TimeoutError(f"{named}: not within {PATIENCE:.0f} s; {self.look('/health').text}")

    def ready(self) -> bool:
        """True if requests are answered at once."""
        return bool(self.look("/ready").is_success)

    def ask(self) -> str:
        """An answer's text."""
        url = f"http://127.0.0.1:{PORT}/v1/completions"
        answer = httpx2.post(url, json=ASKED, timeout=4 * PATIENCE, trust_env=False)
        return str(answer.json()["choices"][0]["text"]) if answer.is_success else f"{answer.status_code}: {answer.text}"

    def _ask_on(self) -> None:
        while not self.over.is_set():
            try:
                if (text := self.ask()) != self.expected:
                    self.wrong.append(f"{text!r} instead of {self.expected!r}")
                self.answers += 1
            except Exception as error:  # whatever it is, the promise was broken
                self.wrong.append(f"{type(error).__name__}: {error}")
                time.sleep(1)

    def losses(self) -> int:
        """As /metrics counts them."""
        [line] = [line for line in self.look("/metrics").text.splitlines() if line.startswith("weft:restarts_total")]
        return int(float(line.split()[-1]))

    def run(self, seconds: float, tell: Callable[[str], None]) -> None:
        """Harms in turn, each time until all is well again."""
        m = self.machines
        harms = {"cable pulled": m.pull, "worker killed": m.kill_worker, "own rank killed": m.kill_own,
                 "machine killed": m.kill_machine, "worker stopped": m.stop_worker}  # fmt: skip
        self.until(self.ready, "ready")
        self.expected = self._asking.submit(self.ask).result(60)
        asking = self._asking.submit(self._ask_on)
        begin = time.monotonic()
        while time.monotonic() - begin < seconds:
            for name, harm in harms.items():
                before, answers, at = self.losses() if self.ready() else -1, self.answers, time.monotonic()
                harm()
                self.until(lambda before=before: self.ready() and self.losses() > before, name)  # type: ignore[misc]
                self.until(lambda answers=answers: self.answers > answers + 1, f"answers after {name}")  # type: ignore[misc]
                self.harmed[name] += 1
                if (counted := self.losses() - before) != 1:
                    self.wrong.append(f"{name}: {counted} losses instead of one")
                tell(f"{name}: well again after {time.monotonic() - at:.1f} s")
        self.over.set()
        asking.result(4 * PATIENCE)

    def close(self) -> None:
        """Ends the threads."""
        self.over.set()
        self._looking.shutdown(wait=False)
        self._asking.shutdown(wait=False)


def main() -> int:
    """Runs it, prints what happened, and says by its exit code whether all held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.NamedTemporaryFile(prefix="weft-unplugging-") as said:
        machines = Machines(Path(said.name))
        trial = Trial(machines)
        try:
            trial.run(given.seconds, lambda line: print(line, flush=True))
        except TimeoutError as error:
            trial.wrong.append(str(error))
        finally:
            trial.close()
            machines.close()
        terminal = Path(said.name).read_text("utf-8", "replace")
    for word in ("Traceback", "gloo", "❌"):
        if word.lower() in terminal.lower():
            trial.wrong.append(f"{word} on a terminal")
    result = {"harmed": trial.harmed, "answers": trial.answers, "wrong": trial.wrong}
    print(f"{sum(trial.harmed.values())} losses, {trial.answers} answers, {len(trial.wrong)} wrong")
    for line in trial.wrong[:20]:
        print(f"  wrong: {line}")
    if trial.wrong:
        print(terminal[-3000:])
    if given.json:
        given.json.write_text(json.dumps(result, indent=2))
    return 1 if trial.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
