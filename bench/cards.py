"""Which flags do the usual cards want for the usual models? The table of docs/running.md.

    python -m bench.cards                                            # all of it
    python -m bench.cards --models Qwen/Qwen2.5-0.5B --cards 1x24    # a part

Each row is what `srft.py --dry_run --model MODEL --dry_run_cards CARDS` says, for the paper's step of 128
prompts x (8 rollouts + 1 demonstration) and responses of 8,192 tokens at most; but the last simulation, which
confirms the search, is left out.
"""
from functools import cache, partial

import model as M
from bench import common, dry_run, plan, search, steptime
from bench.plan import GIB
from config import Config, keeps_own_rope, recomputed_blocks
from support.flags import Parser

MODELS = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-7B", "Qwen/Qwen2.5-14B")
CARDS = ("1x24", "1x48", "1x80", "2x24", "2x48", "4x80", "8x40", "8x80", "4x141")
HEADER = ("model", "cards", "fits as it is", "flags", "left in training, GiB", "left in generation, GiB",
          "host memory a node, GiB", "a step, s")


@cache
def activations_of(model, number):
    """(config, search.Activations) of a model on so many cards."""
    cfg = Config(model=model)
    config, _ = plan.read_config(model, cfg.rope_theta, cfg.window, keeps_own_rope(cfg))
    return config, search.Activations(config, cfg, number)


def estimate(activations, config, cfg, number):
    """As plan.simulate, by formulas: 16 bytes a parameter, and the activations of the search."""
    parameters, shard = sum(p.numel() for p in M.empty_model(config).parameters()), min(number, plan.NODE)
    shards = [size * parameters // shard for size in (4, 8, 4)]
    recomputed = recomputed_blocks(cfg, config.num_hidden_layers)
    return plan.place(config, cfg, activations(cfg.micro_batch_tokens, recomputed), shards, parameters,
                      number > plan.NODE)


def row(model, text):
    """One row: of `model` on the cards that `text` names."""
    cfg, cards = Config(model=model), search.read_cards(text)
    config, activations = activations_of(model, cards.number)
    simulate = partial(estimate, activations)
    memory = simulate(config, cfg, cards.number)
    as_it_is = "yes" if search.fits(config, cfg, cards, memory) else "no"
    found = search.propose(config, cfg, cards, memory, activations, simulate)
    if found is None:
        found = search.propose_shorter(config, cfg, cards, memory, activations, simulate)
    if found is None:
        return [model, str(cards), as_it_is, "no flags make it fit", "", "", "", ""]
    proposed, memory = found
    flags = search.flags(cfg, proposed)
    _, used, _ = plan.budget(proposed, memory, cards.memory)
    left = [f"{(cards.memory - size) / GIB:.1f}" for size in used]
    m = steptime.machine(cards.number, cards.memory, proposed.offload)
    step = steptime.step_time(m, config, proposed, plan.counts(config, memory), plan.TYPICAL[1])["step"]
    return [model, str(cards), as_it_is, f"`{flags}`" if flags else "none", *left,
            f"{dry_run.host_memory(memory, cards) / GIB:.0f}", f"{step:,.0f}"]


def main():
    p = Parser(prog="python -m bench.cards", description=__doc__)
    p.add_argument("--models", nargs="+", default=MODELS, help="folders or hub names [%(default)s]")
    p.add_argument("--cards", nargs="+", default=CARDS, help="as --dry_run_cards of srft.py [%(default)s]")
    args = p.parse_args()
    rows = []
    for model in args.models:
        for text in args.cards:
            rows.append(row(model, text))
            print(*rows[-1], flush=True)                                  # it takes minutes
    common.show("Which flags, by the plan", HEADER, rows)


if __name__ == "__main__":
    main()
