"""`python -m bayeslora.cli`, the same as `bayeslora`."""

from __future__ import annotations

import sys

from bayeslora.cli.main import main

sys.exit(main())
