"""The papers' production loop in small (OneRec, Figure 3; Technical Report, section 4): simulated days, real
processes.

    onerec loop --output outputs/loop --policy gbpo --num_days 10
    tensorboard --logdir outputs/loop/tensorboard

Five processes that know of one another by the files of one folder alone. *Users* of a simulated world ask the
*service* (`onerec serve`, on this machine alone) for lists and watch them; the *logger* turns what they did into
sharded parquet; the *trainer* goes on with the model of the day before (`onerec sft --continue_from`; preference pairs
or GBPO, as `--policy` says); the *publisher* makes a version of it, which the service swaps in. New videos come every
day. Whatever is killed is started again and does what is left, and so does this command. Writes `days.json`: what each
day brought. A simulated world says nothing about real users.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from .checks import check_output
from .loop_report import Dashboard
from .loop_state import Loop, LoopArguments, read_json, write_json
from .model_arguments import mapping
from .parser import ScriptParser

PARTS = ("logger", "trainer", "publisher", "service", "users")
MAX_DEATHS = 5  # of one part between two days
MAY_CHANGE = ("output", "port")


def open_folder(args: LoopArguments) -> Loop:
    """The folder of a loop, new or as it was left; raises where it is that of another one."""
    check_output(args.output, replaces=False)
    mapping(args.model)  # the trainer's process would say it much later
    place, now = Path(args.output) / "settings.json", asdict(args)
    if place.exists():
        before = read_json(place)
        if different := [name for name in now if name not in MAY_CHANGE and before.get(name) != now[name]]:
            there = ", ".join(f"{name}={before.get(name)!r}" for name in different)
            raise ValueError(
                f"output={args.output!r} is the folder of a loop with {there}: give the same, or another folder."
            )
    write_json(place, now)
    return Loop(args.output, args)


class Parts:
    """The processes, each with its log in `logs/`."""

    def __init__(self, loop: Loop):
        self.loop, self.deaths = loop, Counter[str]()
        self.running: dict[str, subprocess.Popen] = {}
        (loop.root / "logs").mkdir(parents=True, exist_ok=True)

    def start(self, part: str) -> None:
        command = [sys.executable, "-m", "onerec_hf.scripts.loop_parts", part, str(self.loop.root), str(os.getpid())]
        with open(self._log(part), "ab") as log:
            self.running[part] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def _log(self, part: str) -> Path:
        return self.loop.root / "logs" / f"{part}.txt"

    def look_after(self) -> None:
        """
        Starts again what has died.

        Raises:
            RuntimeError: One that dies again and again, with the end of its log.
        """
        for part, process in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[part]
            if process.returncode == 0 and part != "service":
                continue  # it has done all its days
            self.deaths[part] += 1
            if self.deaths[part] > MAX_DEATHS:
                text = self._log(part).read_text(encoding="utf-8", errors="replace")[-2000:]
                raise RuntimeError(f"the {part} died {self.deaths[part]} times within a day; its log ends:\n{text}")
            print(f"the {part} ended with {process.returncode}: started again", flush=True)
            self.start(part)

    def stop(self) -> None:
        """Ends all of them; what they were doing is done again when the loop goes on."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main(args: LoopArguments) -> list[dict]:
    """Runs the loop to its end; returns what it writes to `days.json`."""
    loop = open_folder(args)
    dashboard, parts = Dashboard(loop), Parts(loop)
    try:
        for part in PARTS if dashboard.next_day <= args.num_days else ():
            parts.start(part)
        while dashboard.next_day <= args.num_days:
            parts.look_after()
            if not loop.place("impressions", dashboard.next_day).exists():
                time.sleep(0.3)
                continue
            print(json.dumps(dashboard.add()), flush=True)
            parts.deaths.clear()
    finally:
        parts.stop()
    return dashboard.days


def run(argv: list[str] | None = None) -> None:
    """`onerec loop`; `argv`: its arguments, by default those of the command line."""
    main(*ScriptParser("loop", __doc__, [LoopArguments]).parse(argv))


if __name__ == "__main__":
    run()
