"""The eight stages of the pipeline, one script each, run as `python -m stages.<name>`.

Importing the package checks, before anything heavy is imported, that it is the project's own python that does so.
"""

import sys

from stages.lib.environment import fault

if message := fault():
    sys.exit(message)
