"""`python -m nspo` is the command `nspo`."""

import sys

from nspo.cli import main

sys.exit(main())
