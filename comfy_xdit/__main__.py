"""`python -m comfy_xdit` is the command comfy-xdit."""

import sys

from comfy_xdit.cli import main

sys.exit(main())
