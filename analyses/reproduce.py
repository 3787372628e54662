"""Run `icl-dual reproduce`: the paper's comparison on a real model and real data, layer by layer."""

import sys

from icl_dual.scripts.reproduce import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    sys.exit(main())
