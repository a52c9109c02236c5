"""The daemon, which says on SIGUSR1 what it counts."""

import sys

import counts
from weightsync.orchestrator.cli import main as cli

if __name__ == "__main__":
    counts.install()
    sys.exit(cli.main())
