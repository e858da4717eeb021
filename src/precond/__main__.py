"""`python -m precond` is the command `precond`."""

import sys

from precond.cli import main

if __name__ == "__main__":
    sys.exit(main())
