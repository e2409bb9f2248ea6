"""`python -m nspo_gallery NAME` prints where a file of bases is, for a command line."""

import sys

from nspo_gallery import path

sys.stdout.write(f"{path(sys.argv[1])}\n")
