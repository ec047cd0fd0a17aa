"""`onerec serve` from a checkout; `--help` says what it does.

python recipes/serve.py --repo outputs/mymodel --port 8000
"""

from onerec_hf.scripts.serve import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.serve import run

if __name__ == "__main__":
    run()
