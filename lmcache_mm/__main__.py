"""python -m lmcache_mm"""

import sys

from lmcache_mm.commands.cli import main

sys.exit(main())
