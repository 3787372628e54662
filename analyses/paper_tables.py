"""Write the paper's tables from finished cells, or print the metrics of a folder of recordings."""

import sys

from icl_dual.scripts.paper_tables import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    sys.exit(main())
