"""`python -m zimage_lit run NAME …`: the same as the `zimage` command."""

import sys

from zimage_lit.cli import main

sys.exit(main())
