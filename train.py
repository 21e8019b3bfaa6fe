"""Pre-train a pseudo-masked language model: `pmlm train` as a script, which launchers start on every rank.

deepspeed --num_gpus 8 train.py                  the paper's base model on data/corpus
deepspeed --num_gpus 2 train.py --preset tiny    the demo

torchrun, srun and mpirun start it as well. Any setting is overridden by name, for example `--train.steps 1000`.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # until the rank handles it: Ctrl-C ends the imports without a traceback
    sys.argv.insert(1, "train")
    from pmlm_dist.cli import main

    sys.exit(main())
