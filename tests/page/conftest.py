"""Lets the page's modules find each other, and the stand-in engines of the soak."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "soak")]
