"""`python -m stepflash` is the `stepflash` command."""

import sys

from stepflash.cli import main

sys.exit(main())
