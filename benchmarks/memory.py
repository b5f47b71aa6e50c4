"""Measure the resident memory of a training run after each of its epochs, through the switch to ASGD (Linux).

    python benchmarks/memory.py --data data/penn --emsize 100 --nhid 200 --nonmono 2 --epochs 30

All flags are those of main.py.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

MAIN = Path(__file__).parent.parent / "main.py"


def resident(process):
    """Return the MiB that a process has resident now."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) / 1024


def main():
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, MAIN, *sys.argv[1:], "--save", f"{folder}/m.pt"]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in run.stdout:
            if "end of epoch" in line:
                print(f"{resident(run):8.1f} MiB  {line.split('|')[1].strip()}", flush=True)
            elif "switching" in line:
                print("              switching to ASGD", flush=True)
        sys.exit(run.wait())


if __name__ == "__main__":
    main()
