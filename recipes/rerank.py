"""`onerec rerank` from a checkout; `--help` says what it does.

python recipes/rerank.py --model outputs/mymodel --data outputs/mydata --scorers outputs/cooccurrence outputs/sasrec
"""

from onerec_hf.scripts.rerank import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.rerank import run

if __name__ == "__main__":
    run()
