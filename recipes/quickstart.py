"""`onerec quickstart` from a checkout; `--help` says what it does.

python recipes/quickstart.py --output outputs/quickstart
"""

from onerec_hf.scripts.quickstart import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.quickstart import run

if __name__ == "__main__":
    run()
