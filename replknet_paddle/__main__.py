"""`python -m replknet_paddle`, the same as the command `replknet`."""

import sys

from replknet_paddle.commands import main

if __name__ == "__main__":
    sys.exit(main())
