"""`onerec leaderboard` from a checkout; `--help` says what it does.

python recipes/leaderboard.py --dataset outputs/beauty --entries recipes/configs/leaderboard.yaml --output
outputs/leaderboard
"""

from onerec_hf.scripts.leaderboard import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.leaderboard import run

if __name__ == "__main__":
    run()
