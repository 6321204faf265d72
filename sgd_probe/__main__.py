"""``python -m sgd_probe``: the same as the ``sgd-probe`` command."""

import sys

from sgd_probe.cli import main

sys.exit(main())
