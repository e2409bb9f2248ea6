"""`python -m nspo` is the command `nspo`."""

import sys

from nspo.cli.main import main

sys.exit(main())
