"""The demo as a Space: REPO, and COMPARE for a second model, come from the Space's variables."""

import os

from onerec_hf.demo import STYLE, make_demo
from onerec_hf.recommender import Recommender

repos = [os.environ.get("REPO", "org/onerec-1b"), *filter(None, [os.environ.get("COMPARE")])]
page = make_demo({repo: Recommender.from_pretrained(repo) for repo in repos})

if __name__ == "__main__":
    page.launch(css=STYLE)
