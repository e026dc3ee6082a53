import os
import sys

print("cannot go on\nlicence expired", file=sys.stderr, flush=True)
os._exit(7)
