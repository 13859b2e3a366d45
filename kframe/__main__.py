"""``python -m kframe``."""

import sys

from kframe.cli import main

sys.exit(main())
