"""``python -m train``; with a command such as ``embed`` as the first word, what is done with a run."""

import sys

if __name__ == "__main__":  # the guard matters: processes that draw pictures import this module again
    from .program import main

    sys.exit(main())
