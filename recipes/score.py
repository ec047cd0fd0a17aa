"""`onerec score` from a checkout; `--help` says what it does.

python recipes/score.py --model outputs/mymodel --data outputs/mydata
"""

from onerec_hf.scripts.score import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.score import run

if __name__ == "__main__":
    run()
