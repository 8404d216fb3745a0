"""``python -m train.compare``, which is ``python -m train compare``."""

import sys

if __name__ == "__main__":  # the guard matters: worker processes import this module again
    from ..program import main

    sys.exit(main(["compare", *sys.argv[1:]]))
