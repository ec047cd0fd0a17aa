"""`onerec publish` from a checkout; `--help` says what it does.

python recipes/publish.py --model outputs/mymodel --data outputs/mydata --baselines outputs/cooccurrence outputs/sasrec
"""

from onerec_hf.scripts.publish import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.publish import run

if __name__ == "__main__":
    run()
