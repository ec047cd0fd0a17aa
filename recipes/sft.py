"""`onerec sft` from a checkout; `--help` says what it does.

accelerate launch recipes/sft.py --config recipes/configs/small_sft.yaml --data outputs/beauty --output_dir
outputs/beauty_v2
"""

from onerec_hf.scripts.sft import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.sft import run

if __name__ == "__main__":
    run()
