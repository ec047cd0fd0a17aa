"""Zero invalid and zero repeated items, over random models, catalogues, subsets, beam widths, sessions and samples.

    python experiments/validity.py --items 1000000 --threads 1

Every seed makes another small OneRec-V2 and another catalogue (sizes, skew, collisions), and generates under a random
subset per user; whatever comes out is looked up in the plain set of the allowed semantic IDs. The suite runs the first
seeds.
"""

import argparse
import time

import torch

from onerec_hf import Catalogue, OneRecV2Config, OneRecV2ForCausalLM


def check_validity(seed: int, num_beams: int = 24) -> int:
    """Generate with everything drawn from `seed`; AssertionError on an item that may not be or is repeated; returns
    how many.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    levels, batch, length = draw(1, 4), draw(1, 4), draw(0, 6)
    sizes = [draw(2, 40) for _ in range(levels)]
    skew = torch.rand((), generator=generator)
    codes = [(torch.rand(draw(1, 400), generator=generator) ** (1 + 3 * skew) * size).long() for size in sizes]
    codes = torch.stack(
        [level[torch.randint(len(level), (draw(1, 1) * 300,), generator=generator)] for level in codes], dim=1
    )
    codes = codes[: draw(1, 300)]
    catalogue = Catalogue(codes, sizes)
    normalization = ["level", "valid"][draw(0, 1)]
    shape = {"hidden_size": 8, "num_hidden_layers": draw(1, 2), "num_attention_heads": 2, "context_embed_dim": 4}
    model = OneRecV2ForCausalLM(
        OneRecV2Config(codebook_sizes=sizes, score_normalization=normalization, **shape)
    ).eval()
    for parameter in model.parameters():
        parameter.data.copy_(
            (1 + 2 * torch.rand((), generator=generator)) * torch.randn(parameter.shape, generator=generator)
        )
    model.catalogue = catalogue
    history = torch.randint(len(codes), (batch, length), generator=generator)
    context = {"context_ids": codes[history] + torch.tensor(model.config.level_offsets)}
    context["context_mask"] = torch.rand(batch, length, generator=generator) < 0.8
    allowed = torch.rand(batch, len(codes), generator=generator) < torch.rand(batch, 1, generator=generator)
    num_items, beams = draw(1, 3), draw(1, num_beams)
    settings = {"num_beams": beams}
    if draw(0, 2) == 0:
        settings = {"do_sample": True, "replacement": False, "generator": generator}
    rows = model.generate(
        **context, **settings, allowed_items=allowed, num_session_items=num_items, num_return_sequences=beams
    )
    return _count(rows.view(batch, beams, num_items, 1 + levels), codes, allowed, model.config)


def _count(rows, codes, allowed, config) -> int:
    total = 0
    for user, sessions in enumerate(rows):
        may = {tuple(code) for code in codes[allowed[user]].tolist()}
        real = [session for session in sessions if (session[:, 1:] != config.pad_token_id).all()]
        dead = len(sessions) - len(real)
        assert (sessions[len(real) :].flatten(1)[:, 1:] == config.pad_token_id).all(), "a live row behind a dead one"
        items = [[tuple(code) for code in (s[:, 1:] - torch.tensor(config.level_offsets)).tolist()] for s in real]
        assert all(item in may for session in items for item in session), "an item that may not be generated"
        assert all(len(set(session)) == len(session) for session in items), "an item twice in a session"
        assert len({tuple(session) for session in items}) == len(items), "a session twice"
        assert not dead or len(sessions[0]) > 1 or len(items) == len(may), "fewer items than exist"
        total += sum(map(len, items))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000, help="generate at least so many")
    parser.add_argument("--beams", type=int, default=400, help="the largest beam width")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    total, seed, start = 0, 0, time.process_time()
    while total < args.items:
        total += check_validity(seed, args.beams)
        seed += 1
    print(
        f"{total:,} items in {seed} runs, 0 invalid, 0 repeated, {time.process_time() - start:.0f} s of processor time"
    )


if __name__ == "__main__":
    main()
