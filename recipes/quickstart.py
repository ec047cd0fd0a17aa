"""`onerec quickstart` from a checkout; `--help` says what it does.

python recipes/quickstart.py --output outputs/quickstart
"""

from onerec_hf.scripts.quickstart import run

if __name__ == "__main__":
    run()
