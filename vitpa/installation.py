"""Which vitpa this is: its version, and where its code lies. Torch-free."""

from pathlib import Path

VERSION = "0.1.0"
CODE = Path(__file__).resolve().parent.parent  # the folder of the packages that run: a checkout, a snapshot, or site-packages
