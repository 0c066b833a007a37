"""Kills writers of capsules at random moments: argv is SEED ROUNDS FOLDER.

Each round forks a process that stores capsules and notes each one that `store` has returned; it is
killed after a random time. Then every file that bears the name of a capsule must be whole, and
every one that was noted must be there. Prints one JSON object.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from nanhunt.capsule import CapsuleFolder, capture, read_capsule


def write(folder, log, first):
    """Store capsules without end; the log tells which are complete."""
    model = torch.nn.Linear(64, 64)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for step in range(first, first + 10_000):
        batch = (torch.full((200, 300), float(step)), torch.arange(step % 50))
        path = folder.store(capture(model, batch, step=step))
        os.write(handle, f"{path.name}\n".encode())


def main():
    """Kill and look, round after round."""
    seed, rounds, place = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    folder, log = CapsuleFolder(place / "capsules", keep=10**6), place / "log"
    rng, drafts, seen = random.Random(seed), 0, 0  # noqa: S311 - to come again
    for number in range(rounds):
        pid = os.fork()
        if pid == 0:
            write(folder, log, number * 10_000)
            os._exit(1)
        time.sleep(rng.uniform(0.005, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        drafts += len(list(folder.path.glob(".capsule-*.part")))
        noted = set(log.read_text().splitlines()) if log.exists() else set()
        there = {path.name for path in folder.files()}
        assert noted <= there, noted - there
        for path in folder.files():
            capsule = read_capsule(path)
            assert bool((capsule.batch[0] == capsule.step).all())
            path.unlink()
        seen += len(there)
        log.unlink(missing_ok=True)
    folder.store(capture(torch.nn.Linear(1, 1), None))
    left = [path.name for path in folder.path.glob(".capsule-*.part")]
    sys.stdout.write(json.dumps({"whole": seen, "drafts": drafts, "left": left}))


if __name__ == "__main__":
    main()
