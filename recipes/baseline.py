"""`onerec baseline` from a checkout; `--help` says what it does.

python recipes/baseline.py --name sasrec --data FOLDER --output outputs/sasrec --seed 0
"""

from onerec_hf.scripts.baseline import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.baseline import run

if __name__ == "__main__":
    run()
