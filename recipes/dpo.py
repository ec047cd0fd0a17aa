"""`onerec dpo` from a checkout; `--help` says what it does.

    accelerate launch recipes/dpo.py --config recipes/configs/small_dpo.yaml --data outputs/mydata \\
        --policy outputs/mymodel \\
        --reward outputs/reward --output_dir outputs/aligned
"""

from onerec_hf.scripts.dpo import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.dpo import run

if __name__ == "__main__":
    run()
