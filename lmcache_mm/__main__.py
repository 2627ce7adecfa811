"""python -m lmcache_mm"""

import sys

from lmcache_mm.cli import main

sys.exit(main())
