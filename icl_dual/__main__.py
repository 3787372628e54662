"""`python -m icl_dual` is the command `icl-dual`."""

import sys

from icl_dual.cli import main

if __name__ == "__main__":
    sys.exit(main())
