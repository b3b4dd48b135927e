"""``python -m stage1_pro.integrations.streetvision``: the same as ``stage1 streetvision launch``."""

import sys

from stage1_pro.cli import main

sys.exit(main(["streetvision", "launch", *sys.argv[1:]]))
