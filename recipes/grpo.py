"""`onerec grpo` from a checkout; `--help` says what it does.

    accelerate launch recipes/grpo.py --policy outputs/mymodel --data outputs/mydata --rewards hit format \\
        --rollout sample \\
        --num_generations 16 --per_device_train_batch_size 64 --sft_weight 1 --output_dir outputs/mymodel_ecpo
"""

from onerec_hf.scripts.grpo import *  # noqa: F403  for those who import the recipe
from onerec_hf.scripts.grpo import run

if __name__ == "__main__":
    run()
