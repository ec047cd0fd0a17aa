"""`onerec ab_test` from a checkout; `--help` says what it does.

    python recipes/ab_test.py --a outputs/quickstart/onerec-v2-quickstart --b outputs/rl --log impressions.parquet \\
        --world '{"num_users": 2000, "num_items": 2000, "seed": 0}' --num_days 7 --seeds 0 1 2 --output outputs/ab
"""

from onerec_hf.scripts.ab_test import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.ab_test import run

if __name__ == "__main__":
    run()
