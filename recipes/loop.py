"""`onerec loop` from a checkout; `--help` says what it does.

python recipes/loop.py --output outputs/loop --policy gbpo --num_days 10
"""

from onerec_hf.scripts.loop import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.loop import run

if __name__ == "__main__":
    run()
