"""python train.py CONFIG.yml [--overrides key=value ...] is the same as `minitrain train`."""

import sys

from minitrain.cli.main import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]], prog="train.py")
