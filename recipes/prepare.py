"""`onerec prepare` from a checkout; `--help` says what it does.

python recipes/prepare.py --config recipes/configs/amazon_prepare.yaml --source FOLDER --output outputs/beauty
"""

from onerec_hf.scripts.prepare import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.prepare import run

if __name__ == "__main__":
    run()
