"""`python -m fastrel`."""

import sys

from fastrel.cli import main

sys.exit(main())
