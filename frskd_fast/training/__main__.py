"""`python -m frskd_fast.training` is `frskd-fast`; torchrun starts it as `torchrun ... -m frskd_fast.training fit ...`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
