"""`onerec demo` from a checkout; `--help` says what it does.

python recipes/demo.py --repo outputs/mymodel
"""

from onerec_hf.scripts.demo import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.demo import run

if __name__ == "__main__":
    run()
