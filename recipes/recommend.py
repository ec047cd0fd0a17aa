"""`onerec recommend` from a checkout; `--help` says what it does.

accelerate launch recipes/recommend.py --repo org/onerec-1b --dataset histories.parquet --output outputs/recommended
--k 20
"""

from onerec_hf.scripts.recommend import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.recommend import run

if __name__ == "__main__":
    run()
