"""Train, kill the run at its first checkpoint, and let the same command resume: interrupted.py RUN_DIR COMMAND..."""

import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    """Return the exit code of the resumed run."""
    run_dir, command = Path(sys.argv[1]), [*sys.argv[2:], "--run-dir", sys.argv[1]]
    process = subprocess.Popen(command)
    while process.poll() is None and not any((run_dir / "checkpoints").glob("step-*")):
        time.sleep(0.2)
    if process.poll() is not None:
        return process.returncode or 1  # it ended before there was a checkpoint to resume from
    time.sleep(2)
    process.kill()
    process.wait()
    print("killed; the same command again:", flush=True)
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
