"""`onerec reward` from a checkout; `--help` says what it does.

python recipes/reward.py --config recipes/configs/kuairand_reward.yaml --data outputs/kuairand --output_dir
outputs/reward
"""

from onerec_hf.scripts.reward import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.reward import run

if __name__ == "__main__":
    run()
