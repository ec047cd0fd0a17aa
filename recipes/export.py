"""`onerec export` from a checkout; `--help` says what it does.

python recipes/export.py --repo outputs/mymodel --output outputs/exported
"""

from onerec_hf.scripts.export import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.export import run

if __name__ == "__main__":
    run()
