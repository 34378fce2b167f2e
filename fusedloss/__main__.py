"""`python -m fusedloss info`."""

import sys

from .information import info

if sys.argv[1:] == ["info"]:
    print(info())
else:
    sys.exit("usage: python -m fusedloss info")
