import sys

from scoresde.cli import main

sys.exit(main())
