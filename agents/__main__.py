"""``python -m weightsync.agents doctor``."""

import sys

from weightsync.agents.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
