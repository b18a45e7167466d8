"""`python -m robustreg`: the command line without the installed script."""

import sys

from robustreg.cli import main

if __name__ == "__main__":
    sys.exit(main())
