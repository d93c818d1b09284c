"""Two machines on one: each with a host name, a network and a folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LINK = "stellar0"


@dataclass
class Machine:
    """Where commands run as on a machine of its own.

    Attributes:
        folder:
            Where they start.
        address:
            What the other machine reaches it by.
        prefix:
            Command that runs another one there.
    """

    folder: Path
    address: str
    prefix: list[str]

    def start(
        self, command: Sequence[str], **environment: str
    ) -> subprocess.Popen[str]:
        """Starts a command; its output is in `output.txt` of the folder."""
        with (self.folder / "output.txt").open("w") as output:
            return subprocess.Popen(
                [*self.prefix, *command],
                cwd=self.folder,
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )


@contextlib.contextmanager
def two_machines(folder: Path) -> Iterator[list[Machine]]:
    """Two machines, joined by a cable.

    Namespaces of the network and of the host name, which need root and `ip`; without
    them both are this machine, and differ in their folders alone.

    Args:
        folder:
            Where their own folders are made.
    """
    names = [f"stellar-{os.getpid()}-{number}" for number in (1, 2)]
    machines = [Machine(folder / name, "127.0.0.1", []) for name in names]
    for machine in machines:
        machine.folder.mkdir()
    try:
        if shutil.which("ip") and _join(names):
            for number, (name, machine) in enumerate(zip(names, machines, strict=True)):
                machine.address = f"10.77.0.{number + 1}"
                named = f'hostname {name}; exec "$@"'
                machine.prefix = ["ip", "netns", "exec", name]
                machine.prefix += ["unshare", "--uts", "sh", "-c", named, "sh"]
        yield machines
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _join(names: Sequence[str]) -> bool:
    """Makes both networks with a cable between them; False where it is not allowed."""
    one, other = names
    ends = [LINK, "netns", one, "type", "veth", "peer", "name", LINK, "netns", other]
    commands = [["netns", "add", name] for name in names] + [["link", "add", *ends]]
    for number, name in enumerate(names):
        inside = ["-n", name]
        address = f"10.77.0.{number + 1}/24"
        commands += [
            [*inside, "address", "add", address, "dev", LINK],
            [*inside, "link", "set", LINK, "up"],
            [*inside, "link", "set", "lo", "up"],
        ]
    done = (subprocess.run(["ip", *c], capture_output=True) for c in commands)
    return all(result.returncode == 0 for result in done)
